"""The inputs of chat templates in a run: `chat_template_kwargs`, and the date if a template reads it.

Both are ingredients of the nodes that render an imported checkpoint's template. The date is that of the first plan of a
run of this name. Its lock pins the date, so that prompts and content keys stay the same on later days.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base.errors import UserError, is_unreachable
from base.store.checkpoint import Artifact
from base.store.source import Source
from flows.run_file.schema import RunConfig
from stages.config.kinds import STAGES
from stages.rows.rendering import reads_date

DATE = "date"
HARNESS = "harness"
# Increased when an imported model's prompts, targets or stops change; the models made here have one rendering.
TOKENS_VERSION = 2
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
# The metadata of a GGUF file, with its template, are at its beginning.
GGUF_HEAD_BYTES = 64 * 2**20


def today() -> str:
    """The machine's date, in the lock's format."""
    return datetime.date.today().isoformat()


class Templates:
    """The templates of a graph's checkpoints, added node by node in the graph's order.

    Args:
        config: The run.
        pins: The pins in the run's lock.
    """

    def __init__(self, config: RunConfig, pins: Mapping[str, str]) -> None:
        self.arguments = config.chat_template_kwargs
        self.date = pins.get(DATE) or today()
        self.pins: dict[str, str] = {}
        # Whether a node's template reads the date; a model made here has its own template without inputs.
        self._imported: dict[str, bool] = {}

    def load(self, node_id: str, source: Source, made: Artifact | None) -> None:
        """Examine the template of an imported checkpoint.

        Args:
            node_id: The import.
            source: Where it comes from.
            made: The import, if it is in the store.

        Raises:
            UserError: the Hub cannot be reached, and neither store nor cache has the checkpoint's files.
        """
        dated = _folder_reads_date(made.path) if made is not None else _source_reads_date(source)
        self._imported[node_id] = dated

    def inherit(self, node_id: str, parent: str | None) -> None:
        """Record that a checkpoint has the template of its start."""
        if parent in self._imported:
            self._imported[node_id] = self._imported[parent]

    def facts(self, stage: str, config: Mapping[str, Any], parent: str | None) -> dict[str, Any]:
        """Ingredients of a node that determine how its prompts are rendered.

        Args:
            stage: The node's stage.
            config: The node's config.
            parent: The node whose template it renders.
        """
        if not STAGES[stage].renders or parent not in self._imported:
            return {}
        found: dict[str, Any] = {"tokens": TOKENS_VERSION}
        if stage == HARNESS and not config["chat_template"]:
            return found
        if self.arguments:
            found["chat_template_kwargs"] = self.arguments
        if self._imported[parent]:
            found[DATE] = self.pins[DATE] = self.date
        return found


def _folder_reads_date(folder: Path) -> bool:
    files = [folder / name for name in TEMPLATE_FILES] + sorted(folder.glob("additional_chat_templates/*.jinja"))
    return any(reads_date(file.read_text(errors="replace")) for file in files if file.is_file())


def _source_reads_date(source: Source) -> bool:
    if source.kind == "directory":
        return _folder_reads_date(Path(source.location))
    if source.kind == "gguf":
        with Path(source.location).open("rb") as file:
            return reads_date(file.read(GGUF_HEAD_BYTES).decode("utf-8", errors="replace"))
    files = [of_hub(source.location, source.revision, name) for name in TEMPLATE_FILES]
    return any(reads_date(file.read_text(errors="replace")) for file in files if file is not None)


def of_hub(repository: str, revision: str | None, name: str) -> Path | None:
    """A small file of a Hub repository at a commit; None if it does not have the file.

    Raises:
        UserError: the Hub cannot be reached, and its cache does not have the file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError as error:
        unreachable: Exception = error
    except EntryNotFoundError:
        return None
    except Exception as error:
        if not isinstance(error, (HfHubHTTPError, OSError)) and not is_unreachable(error):
            raise
        unreachable = error
    raise UserError(
        f"{repository}: the Hugging Face Hub cannot be reached, and the Hub cache does not have its {name}"
    ) from unreachable
