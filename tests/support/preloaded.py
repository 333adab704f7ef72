"""The libraries and stages of a node's process, for a fork server: importing this module imports them."""

from flows.engines.preload import PRELOAD, preload

preload(PRELOAD)
