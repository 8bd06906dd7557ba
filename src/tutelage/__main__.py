"""``python -m tutelage`` is the ``tutelage`` command."""

from tutelage.cli import main

main()
