"""Mixing by weight: exact shares everywhere in an epoch, a function of (seed, epoch) alone, holes kept."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import TrainerCallback

from align.core.errors import DataError
from align.data import mixture as module
from align.data.mixture import Mixture, mixture_of
from align.data.prepare import SourceSpec, prepare_data
from align.data.rejected import RejectedLog
from align.data.stream import GlobalBatchSampler, collate, epoch_order
from align.data.tokenise import Tokeniser
from align.testing.tiny import random_pairs, save_tiny
from align.trainers import AlignConfig, PreferenceTrainer

STREAMS = st.lists(
    st.tuples(st.integers(1, 300), st.sampled_from([0.1, 0.25, 0.5, 1.0, 3.0, 7.0])), min_size=2, max_size=4
)


def mixed(*streams: tuple[int, float]) -> Mixture:
    rows, weights = zip(*streams, strict=True)
    return Mixture(rows, weights)


def stream_of(row: int, mixture: Mixture) -> int:
    for number, count in enumerate(mixture.rows):
        if row < count:
            return number
        row -= count
    raise AssertionError(row)


def counts_of(rows: list[int], mixture: Mixture) -> list[int]:
    found = Counter(stream_of(row, mixture) for row in rows)
    return [found[number] for number in range(len(mixture.rows))]


@settings(max_examples=80, deadline=None)
@given(streams=STREAMS, seed=st.integers(0, 3), epoch=st.integers(0, 5), data=st.data())
def test_every_stretch_of_an_epoch_has_the_shares_to_within_a_row(
    streams: list[tuple[int, float]], seed: int, epoch: int, data: Any
) -> None:
    mixture = mixed(*streams)
    order = mixture.order(seed, epoch)
    rows = order.rows(0, len(order))
    # an independent count: the epoch ends where n_i / p_i is least
    shares = [Fraction(str(weight)) / sum(Fraction(str(w)) for _, w in streams) for _, weight in streams]
    length = min(Fraction(count) / share for (count, _), share in zip(streams, shares, strict=True))
    wanted = [max(1, int(length * share)) for share in shares]
    assert counts_of(rows, mixture) == wanted == list(mixture.counts)
    assert any(want == count for want, (count, _) in zip(wanted, streams, strict=True))  # one is used up
    # a stream goes on where it stopped, so a row may end one pass over it and begin the next: twice, never more
    assert max(Counter(rows).values()) <= (1 if epoch == 0 else 2)
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    for count, want in zip(counts_of(rows[start:stop], mixture), wanted, strict=True):
        # the ends of the stretch may each cut a row's width; a row of each other stream may stand at an end
        assert abs(count - (stop - start) * want / len(rows)) <= 1 + len(streams) * want / len(rows)


@settings(max_examples=40, deadline=None)
@given(streams=STREAMS, seed=st.integers(0, 3), data=st.data())
def test_the_order_is_the_same_however_it_is_read(streams: list[tuple[int, float]], seed: int, data: Any) -> None:
    mixture = mixed(*streams)
    whole = mixture.order(seed, 2).rows(0, sum(mixture.counts))
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start, len(whole)))
    assert mixture.order(seed, 2).rows(start, stop) == whole[start:stop]


def test_slices_join_to_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = mixed((1000, 3.0), (400, 0.9), (7, 0.01))
    whole = mixture.order(1, 0).rows(0, sum(mixture.counts))
    monkeypatch.setattr(module, "_SLICE", 50)
    order = mixture.order(1, 0)
    assert order._slices > 10
    assert order.rows(0, len(order)) == whole
    assert order.rows(333, 777) == whole[333:777]
    assert len(order._made) <= 2


def test_a_stream_goes_on_where_it_stopped_and_is_shuffled_anew_after_a_pass() -> None:
    mixture = mixed((10, 1.0), (40, 1.0000001))  # ten of each
    seen: list[int] = []
    for epoch in range(4):
        rows = mixture.order(5, epoch).rows(0, 20)
        seen += [row - 10 for row in rows if row >= 10]
        assert sorted(row for row in rows if row < 10) == list(range(10))
    assert sorted(seen) == list(range(40))  # every row once before any comes again
    again = [row - 10 for epoch in range(4, 8) for row in mixture.order(5, epoch).rows(0, 20) if row >= 10]
    assert sorted(again) == list(range(40))
    assert again != seen


def test_seed_and_epoch_change_the_order_file_order_does_not() -> None:
    mixture = mixed((60, 2.0), (50, 1.0))
    made = {(seed, epoch): tuple(mixture.order(seed, epoch).rows(0, 90)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(made.values())) == 4
    assert mixture.order(0, 0).rows(0, 90) == list(made[0, 0])
    plain = mixture.order(0, 0, shuffle=False).rows(0, 90)
    assert [row for row in plain if row < 60] == list(range(60))
    assert [row for row in plain if row >= 60] == list(range(60, 90))
    assert plain[:3] == [0, 60, 1]


def test_streams_of_one_size_are_shuffled_each_by_itself() -> None:
    rows = mixed((50, 2.0), (50, 2.0)).order(0, 0).rows(0, 100)
    assert [row for row in rows if row < 50] != [row - 50 for row in rows if row >= 50]


def test_written_decimals_are_exact() -> None:
    assert mixed((700, 0.7), (300, 0.3)).counts == (700, 300)
    assert mixed((1000, 0.9), (1000, 0.1)).counts == (1000, 111)
    assert mixed((5, 1e-6), (1000, 1.0)).counts == (1, 1000)


def test_weights_of_one_join_the_streams_as_before(with_bos: Any) -> None:
    assert mixture_of([3, 4], [1.0, 1.0]) is None
    sources = [random_pairs(5), random_pairs(9, seed=3)]
    joined = prepare_data(sources, Tokeniser(with_bos, "pairs"))
    assert joined.mixture is None
    assert list(joined.sampler(4, 7)) == list(GlobalBatchSampler(14, 4, 7))
    assert [row for batch in joined.sampler(4, 7) for row in batch] == list(epoch_order(14, 7, 0))


def weighted(tokenizer: Any, rows: list[list[Any]], weights: list[float], **options: Any) -> Any:
    specs = [SourceSpec(one, weight=weight) for one, weight in zip(rows, weights, strict=True)]
    return prepare_data(specs, Tokeniser(tokenizer, "pairs"), rejected=RejectedLog(None, 1.0), **options)


def test_batches_of_a_mixture_resume_and_keep_holes(with_bos: Any) -> None:
    rows = [random_pairs(30, seed=1), random_pairs(90, seed=2)]
    data = weighted(with_bos, rows, [1.0, 2.0])
    sampler = data.sampler(12, seed=3)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 8  # 30 + 60 rows
    assert [len(batch) for batch in batches] == [12] * 7 + [6]
    for batch in batches[:-1]:
        assert abs(sum(row < 30 for row in batch) - 4) <= 1
    again = data.sampler(12, seed=3)
    again.start = 5
    assert list(again) == batches[5:]
    again.set_epoch(1)
    assert list(again) != batches
    later = list(again)
    assert [again.batch(step) for step in (6, 0)] == [later[6], later[0]]
    holed = weighted(with_bos, [[*rows[0][:4], {"prompt": "q"}, *rows[0][5:]], rows[1]], [1.0, 2.0])
    for step, wanted in enumerate(batches):
        assert holed.sampler(12, seed=3).batch(step) == wanted
        batch = collate(holed.dataset.__getitems__(wanted))
        assert [hole.index for hole in batch.holes] == [row for row in wanted if row == 4]
        assert len(batch) == len(wanted) - len(batch.holes)


def test_weights_are_part_of_the_fingerprint(with_bos: Any) -> None:
    rows = [random_pairs(6), random_pairs(6, seed=9)]
    marks = {weighted(with_bos, rows, weights).fingerprint for weights in ([1, 1], [1, 2], [2, 1])}
    assert len(marks) == 3


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ([2.0], {}, "nothing to mix a single source with"),
        ([1.0, 2.0], {"purpose": "eval"}, "evaluation reads every row once"),
        ([1.0, 0.0], {}, "must be above 0"),
        ([1.0, -1.0], {}, "must be above 0"),
    ],
)
def test_weights_that_say_nothing_are_refused(
    weights: list[float], options: dict[str, Any], words: str, with_bos: Any
) -> None:
    with pytest.raises(DataError, match=words):
        weighted(with_bos, [random_pairs(4, seed=seed) for seed in range(len(weights))], weights, **options)


def test_a_run_on_a_mixture_resumes_bit_for_bit(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "model"))
    streams = [SourceSpec(random_pairs(8, seed=1), weight=1.0), SourceSpec(random_pairs(40, seed=2), weight=2.0)]

    def run(folder: str, stop: int = 0) -> PreferenceTrainer:
        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = control.should_save = state.global_step == stop

        args = AlignConfig(
            output_dir=str(tmp_path / folder),
            global_batch_size=6,
            learning_rate=1e-3,
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=100,
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = PreferenceTrainer(model, "dpo", args, streams, callbacks=[Stop()])
        trainer.train()
        return trainer

    whole = run("whole")
    assert whole.state.global_step == 8  # 8 + 16 rows an epoch, six a step
    run("cut", stop=6)
    resumed = run("cut")
    assert resumed.state.global_step == 8
    losses = [[line["loss"] for line in one.state.log_history if "loss" in line] for one in (whole, resumed)]
    assert losses[0] == losses[1]
    ends = [load_file(tmp_path / folder / "policy" / "model.safetensors") for folder in ("whole", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
