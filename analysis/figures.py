"""Old name of analysis.plotting.style, until every import has the new one."""

from analysis.plotting.style import *  # noqa: F403
