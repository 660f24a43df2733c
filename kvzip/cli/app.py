"""The command line's tree of commands, to which the modules beside add theirs."""

from __future__ import annotations

from cyclopts import App, Parameter

import kvzip
from kvzip.cli.terminal import help_console

app = App(
    name="kvzip",
    help="Lossless compression of language models' KV caches, and when it pays.",
    version=kvzip.__version__,
    console=help_console(),
    suppress_keyboard_interrupt=False,
    # A name that begins with a bracket is a name, and no list in JSON.
    default_parameter=Parameter(negative_iterable=(), json_list=False),
)
evaluate = App(name="eval", help="The evaluation: prices, the paper, what compression is worth.")
app.command(evaluate)
app.register_install_completion_command()
