"""`python -m align`."""

from align.cli.main import main

raise SystemExit(main())
