"""What goes beside exported label vectors: the query encoder, and code that asks with it.

The code of a card does, with public libraries alone, what `serving` does here: texts to query
vectors, a search, names. Tests run it as it stands.
"""

from __future__ import annotations

from pathlib import Path

from unidec_ds.assembly import LoadedRun
from unidec_ds.evaluation import SearchView
from unidec_ds.export.labels import ExportLabels
from unidec_ds.export.model_card import model_card
from unidec_ds.export.sentence_encoder import write_sentence_encoder

QUERY_ENCODER = "query_encoder"


def hides_labels(run: LoadedRun, view: SearchView) -> str:
    """Returns a sentence on the labels that no query may find, empty if there are none."""
    if view != "de" or run.corpus.label_has_text.all():
        return ""
    return " Labels without a text have a vector of zeros: leave them out, as below."


def contents_of(labels: ExportLabels, view: SearchView) -> str:
    """Returns what the vectors are, in a few sentences."""
    num_labels, width = labels.shape
    meaning = {
        "de": "of the dual encoder (score: cosine of query and label text)",
        "classifier": "of the classifier (score: its unit query vector times the label's row)",
        "unified": "of dual encoder and classifier together (score: the sum of both cosines)",
    }[view]
    contents = f"{num_labels:,} label vectors of width {width}, {meaning}."
    if labels.num_new:
        contents += (
            f" The last {labels.num_new:,} are of labels that the model was not trained on; the "
            "classifier head's vector of their text stands in for a trained row."
        )
    if labels.has_offset:
        contents += (
            " Their scores need an offset to be comparable with the others': it is the vectors' "
            "last column, and a query has a 1 there."
        )
    return contents


def write_query_side(
    run: LoadedRun,
    folder: Path,
    view: SearchView,
    labels: ExportLabels,
    *,
    tags: list[str],
    license_id: str | None,
    title: str,
    introduction: str,
    imports: str,
    opening: str,
    search: str,
) -> None:
    """Writes the query encoder and the card whose code goes from texts to labels.

    Args:
        run: the run.
        folder: of the export.
        view: what the vectors are of.
        labels: whose vectors they are.
        tags: of the card.
        license_id: of the card.
        title: of the card.
        introduction: what the files hold.
        imports: a line of the code beside the common ones, or "".
        opening: lines that open `labels` and whatever `search` needs.
        search: lines that make `ids` and `scores` of `queries`.
    """
    write_sentence_encoder(run.model, run.recipe.encoder, folder / QUERY_ENCODER, view)
    lines = [
        *([imports] if imports else []),
        "import numpy as np",
        "import pyarrow.parquet as pq",
        "from sentence_transformers import SentenceTransformer",
        "",
        opening,
        f'encoder = SentenceTransformer("{QUERY_ENCODER}")',
        "",
        "",
        *_query_vectors(run, view, labels.has_offset),
        "",
        "",
        'queries = ["a query", "another"]',
        search,
        "for query, row_ids, row_scores in zip(queries, ids, scores):",
        "    print(query)",
        "    for i, score in zip(row_ids, row_scores):",
        *(["        if i < 0:  # fewer found", "            break"] if "faiss" in imports else []),
        '        print(f"  {score:.3f}", labels["uid"][int(i)], labels["text"][int(i)])',
    ]
    usage = f"In this folder:\n\n{code_block(chr(10).join(lines))}"
    if view == "unified":
        usage += (
            "\n\nEach half of a query vector has a norm of its own. sentence-transformers has no "
            "module for that, so the folder yields the outputs of both heads and `query_vectors` "
            "does the rest."
        )
    card = model_card(
        run,
        title=title,
        introduction=introduction,
        usage=usage,
        header={
            "library_name": "unidec_ds",
            "pipeline_tag": "feature-extraction",
            "tags": tags,
        },
        license_id=license_id,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _query_vectors(run: LoadedRun, view: SearchView, has_offset: bool) -> list[str]:
    """Returns the lines of a function that does what `label_vectors.query_vectors` does."""
    lines = ["def query_vectors(texts):"]
    result = "encoder.encode(texts)"
    if view == "unified":
        lines += [
            "    heads = encoder.encode(texts)",
            "    heads = heads.reshape(len(texts), 2, -1)  # dual encoder, classifier",
        ]
        if run.recipe.model.de_activation == "tanh":
            lines.append("    heads[:, 0] = np.tanh(heads[:, 0])")
        lines.append("    heads /= np.maximum(np.linalg.norm(heads, axis=2, keepdims=True), 1e-12)")
        result = "heads.reshape(len(texts), -1)"
    if has_offset:
        result = f"np.pad({result}, ((0, 0), (0, 1)), constant_values=1)"
    return [*lines, f"    return {result}"]


def code_block(text: str) -> str:
    """Returns Python code as Markdown."""
    return f"```python\n{text}\n```"
