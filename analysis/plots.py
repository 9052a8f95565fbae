"""Old name of parts of analysis.plotting.style, until every import has the new one."""

from analysis.plotting.style import TITLE, label_epochs, new_blocks  # noqa: F401
