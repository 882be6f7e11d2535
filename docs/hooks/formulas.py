"""Formulas as MathML, which browsers draw by themselves: no script, no font from elsewhere; and what symbols mean."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from latex2mathml.converter import convert_to_element
from mkdocs.exceptions import PluginError

NOTATION = {
    r"x, y, y_t": "a prompt, an answer, its token at place t; places count scored tokens",
    r"y_w, y_l": "the chosen (winning) and the rejected (losing) answer of a pair",
    r"y_i, K": "the answers of a list, or samples for one prompt, and their number",
    r"i, j, P": "numbers of answers or of pairs, and the pairs of the global batch, where a loss sees them all",
    r"i \in B": "the pairs of the batch that are kept",
    r"|y|": "scored tokens of an answer",
    r"y_{\mathrm{demo}}, y_{\mathrm{base}}": "the prompt's demonstration, and the answer that `baseline` names",
    r"y_{\mathrm{ref}}": "the answer of a pair that the reference wrote",
    r"\phi": "1 where that answer came to its end, 0 where it was cut",
    r"\pi, \pi_{\mathrm{ref}}, \pi_g": "the policy, the reference, a guide (a policy trained before)",
    r"\pi_{\mathrm{prev}}, \pi_{\mathrm{old}}": "the policy as the round began, and as the update did",
    r"\log\pi(y)": "log-probability of the answer after its prompt, summed over scored tokens, in nats",
    r"h(y), h_w, h_l, h_i": "the log-ratio to the reference, summed over tokens, of an answer, of a pair's two answers "
    "and of a list's",
    r"h_t(y)": "the log-ratio of one token",
    r"\Delta": "a pair's difference of log-ratios, chosen less rejected",
    r"z": "a margin: that difference times its scale",
    r"\sigma": "the sigmoid; `-log sigmoid` is the logistic loss",
    r"r, r_i, r_w, r_l, \psi_i": "the data's reward or scores, or the probability of beating an opponent; "
    "by the formula's own line another reward",
    r"\bar{r}, \bar{r}_D, \bar{r}_U": "the mean over the list, over the desirable and over the undesirable answers",
    r"R, P": "a pair's difference of scores and its probability, as the data give them",
    r"p, c": "the probability that a pair's label is right",
    r"V(x), V_t": "the value of the prompt, and of the state before a token",
    r"\pi_{\mathrm{old}}": "the policy whose weights the step, or the batch of rollouts, began with",
    r"A_t(y), A(y)": "the advantage of a token, or of an answer, that shaping made of the rewards",
    r"q_t, v_t": "the logit of a token and the log-sum-exp of its place's logits; v is 0 after the end",
    r"a_i \propto \ldots": "shares of the list: divided by their sum, so that they add up to 1",
    r"u_{(i)}": "the ith smallest of the batch",
    r"t_i": "in ranking losses, the place of an answer in its list by the policy's reward, 1 the highest",
    r"M_t": "1 where a token is in a part in which a pair's answers differ, else 0",
    r"k_t": "turns (or scored tokens) before a token",
    r"e, E": "the epoch, from 0, and the epochs of the run",
    r"\operatorname{sg}[u]": "u as a constant: no gradient goes through it",
    r"\leftarrow": "renewed at each step, the new value on the left; checkpointed",
    r"\mathcal{L}, \mathcal{L}_t": "the loss of one unit, averaged over the units of the global batch: pairs, answers, "
    "lists, or scored tokens where it has a t",
}
"""LaTeX -> words: every symbol of a formula that is neither an option nor defined in it."""

SYMBOLS = {
    "eps": r"\varepsilon",
    "label_smoothing": r"\varepsilon",
    "beta0": r"\beta_0",
    "beta_pi": r"\beta_\pi",
    "beta_guide": r"\beta_g",
    "gamma_ratio": r"\gamma_r",
    "sft_weight": r"w_{\mathrm{sft}}",
    "bc_weight": r"w_{\mathrm{bc}}",
    "value_weight": r"w_V",
    "desirable_weight": r"w_D",
    "undesirable_weight": r"w_U",
    "R_max": r"R_{\max}",
    "epsilon": r"\epsilon",
    "epsilon_high": r"\epsilon_{\mathrm{high}}",
    "max_completion_length": r"L_{\max}",
    "sign": "s",
}
"""Option -> symbol, where it is not the option's own name; `SYMBOLS_OF` holds for one method."""
SYMBOLS_OF = {
    ("bco", "clip"): r"w_{\min}, w_{\max}",
    ("robust_bt", "floor"): r"c_{\min}",
    ("robust_bt", "ceiling"): r"c_{\max}",
    ("tgdpo", "floor"): r"f_{\min}",
    ("wpo", "clamp"): r"W_{\max}",
}
_GREEK = ("alpha", "beta", "gamma", "delta", "eta", "kappa", "lambda", "mu", "rho", "tau")
_NAMESPACE = "http://www.w3.org/1998/Math/MathML"
_FUNCTIONS = {"log", "ln", "exp", "max", "min", "sg", "clip", "mean", "std", "sign", "KL"}
_PARTS_OF = {"mfrac": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "msubsup": 3, "munderover": 3}
_NEVER = {"&", "{", "}"}
_OPENS = {"(", "[", "|"}
_CLOSES = {")", "]"}


def symbol(method: str, option: str) -> str:
    """The LaTeX of an option in its method's formula; the empty text for one that has none there by rule."""
    if (method, option) in SYMBOLS_OF:
        return SYMBOLS_OF[method, option]
    if option in SYMBOLS:
        return SYMBOLS[option]
    head, _, tail = option.partition("_")
    if head in _GREEK:
        return f"\\{head}" + (f"_{tail}" if tail else "")
    return option if len(option) == 1 else ""


def stands_in(formula: str, latex: str) -> bool:
    """Whether a formula holds a symbol (or all of several, split by commas)."""
    return all(re.search(re.escape(one) + r"(?![A-Za-z_])", formula) for one in latex.split(", "))


def display(latex: str, where: str) -> str:
    """A formula of rows and columns as one line of HTML, in a box of its own that scrolls.

    Raises:
        PluginError: `latex` has something that would be shown as it is written.
    """
    table = ElementTree.Element("mtable", displaystyle="true")
    for row in latex.split(r"\\"):
        line = ElementTree.SubElement(table, "mtr")
        for cell in row.split("&"):
            ElementTree.SubElement(line, "mtd").extend(_parts(cell.strip(), where, "block"))
    math = ElementTree.Element("math", xmlns=_NAMESPACE, display="block")
    math.append(table)
    return f'<div class="formula" tabindex="0" role="group" aria-label="formula">{_text(math)}</div>'


def inline(latex: str, where: str) -> str:
    """A short formula within a sentence."""
    math = ElementTree.Element("math", xmlns=_NAMESPACE)
    math.extend(_parts(latex, where, "inline"))
    return _text(math).replace("|", "&#124;")  # a bar would end a table's cell


def _parts(latex: str, where: str, kind: str) -> list[ElementTree.Element]:
    if not latex:
        return []
    try:
        made = convert_to_element(latex, display=kind)
    except Exception as error:
        raise PluginError(f"{where}: the formula `{latex}` has no MathML: {type(error).__name__} {error}") from error
    if latex.count("{") != latex.count("}"):
        raise PluginError(f"{where}: a brace is missing in `{latex}`")
    if r"\begin" in latex:
        raise PluginError(f"{where}: `{latex}` has an environment; rows and columns make the table by themselves")
    for element in list(made.iter()):
        text = element.text or ""
        if "\\" in text or text in _NEVER or element.get("linebreak"):
            raise PluginError(f"{where}: `{text or latex}` of the formula would be shown as it is written")
        if len(element) != _PARTS_OF.get(element.tag, len(element)):
            raise PluginError(f"{where}: something is missing in `{latex}`")
        if element.tag == "mo" and text.isalpha() and text.isascii():
            element.tag = "mi"  # a name, not a sign between two sides
        if element.tag not in _PARTS_OF:
            element[:] = _spaced(list(element))
    return list(made)


def _spaced(elements: list[ElementTree.Element]) -> list[ElementTree.Element]:
    """With a thin space between a function's name and what is no bracket, and before the name."""
    made: list[ElementTree.Element] = []
    for number, element in enumerate(elements):
        if _is_function(element) and made and (made[-1].tag != "mo" or _plain(made[-1]) in _CLOSES):
            made.append(_thin())
        made.append(element)
        if _is_function(element) and number + 1 < len(elements) and not _opens(elements[number + 1]):
            made.append(_thin())
    return made


def _is_function(element: ElementTree.Element) -> bool:
    if element.tag in ("msub", "munder"):
        element = element[0]
    return element.tag in ("mi", "mo") and element.text in _FUNCTIONS


def _opens(element: ElementTree.Element) -> bool:
    first = element[0] if element.tag == "mrow" and len(element) else element
    return _plain(first) in _OPENS


def _plain(element: ElementTree.Element) -> str:
    """The sign of an element; latex2mathml leaves entities in its text."""
    return re.sub(r"&#x([0-9A-Fa-f]+);", lambda found: chr(int(found[1], 16)), element.text or "")


def _thin() -> ElementTree.Element:
    return ElementTree.Element("mspace", width="0.17em")


def _text(math: ElementTree.Element) -> str:
    for element in math.iter():
        element.text = _plain(element) or None
    return ElementTree.tostring(math, encoding="unicode")
