"""Check the model of a run, and render its first rows with its chat template, before the run waits
in a queue.

    python -m launcher.row_check CONFIG.yaml

`launcher.cluster.preflight` starts it in a process of its own, because tokenizers import torch. The
exit status is 2, with the message on stdout, if the model cannot be trained, if it could not be
exported after training, or if the template refuses a row.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

from launcher.config import Config, store
from launcher.config.schema.data import HUB
from launcher.data import source
from launcher.data.tokenize import RowTokenizer
from launcher.errors import REFUSED, UserError
from launcher.export.exportable import check_exportable
from launcher.folders.vocabulary import embedding_rows
from launcher.model.architecture import find_class
from launcher.model.tokenizer import load_tokenizer

ROWS = 256  # of each source


def main() -> None:
    """The command line."""
    try:
        check_rows(store.load(Path(sys.argv[1])))
    except UserError as error:
        print(error)  # alone on stdout: libraries warn on stderr
        sys.exit(REFUSED)


def check_rows(config: Config) -> None:
    """Check the model, and tokenize the first rows of every source of conversations; one of the hub
    is not downloaded for this. Raises UserError for a bad one."""
    folder, code = Path(config.model.name_or_path), config.model.trust_remote_code
    if not code:  # which only the ranks run
        find_class(config.model, folder)
    check_exportable(folder, code)
    if config.data.format == "text":
        return
    tokenizer = load_tokenizer(folder, code, template=config.data.template)
    for each in source.resolve_sources(config.data).values():
        if each.format != "text" and not (each.path or "").startswith(HUB):
            first = list(islice(source.iter_rows(each, by_line=False), ROWS))
            RowTokenizer(each, config.data, tokenizer, embedding_rows(folder))(first)


if __name__ == "__main__":
    main()
