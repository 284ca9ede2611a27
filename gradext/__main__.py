"""``python -m gradext``."""

from .cli import main

raise SystemExit(main())
