"""Writes a program as a package (.mlpackage) with the same bytes each time.

coremltools names a package's parts by random ids and notes the day; here the ids follow from the
paths, and no date is written.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketglm.runtimes._quiet import silence
from pocketglm.targets._coreml_graph import Graph, mil

MODEL = "model.mlpackage"
_AUTHOR = "com.apple.CoreML"
_NOTES = "com.github.apple.coremltools."
_DATE = f"{_NOTES}conversion_date"


def write_package(out: Path, graphs: Mapping[str, Graph], default: str, summary: str) -> None:
    """Write the functions as one package to `out`. default: the one that an app gets unasked.

    summary: what the model is, for Xcode.
    """
    parts, (first, *_) = mil(), graphs.values()
    program = parts.lang.Program()
    for name, graph in graphs.items():
        program.add_function(name, graph.function)
    program.default_function_name = default
    program.export_as_multifunction = len(graphs) > 1
    with silence():  # it draws its progress there
        model = parts.convert(
            program,
            convert_from="milinternal",
            convert_to="mlprogram",
            specification_version=first.target.value,
            compute_units=parts.tools.ComputeUnit.CPU_ONLY,
            pass_pipeline=parts.tools.PassPipeline.EMPTY,
            skip_model_load=True,
        )
    spec, made = model.get_spec(), Path(model.package_path)
    notes = spec.description.metadata
    notes.shortDescription = summary
    notes.userDefined.pop(_DATE, None)
    notes.userDefined[f"{_NOTES}version"] = parts.tools.__version__
    data = out / "Data" / _AUTHOR
    data.mkdir(parents=True)
    (data / "model.mlmodel").write_bytes(spec.SerializeToString(deterministic=True))
    shutil.move(made / "Data" / _AUTHOR / "weights", data / "weights")
    # In the form that coremltools gives it: it writes the file again whenever it opens a package.
    manifest = json.dumps(_manifest(), indent=4, sort_keys=True) + "\n"
    (out / "Manifest.json").write_text(manifest, encoding="utf-8")


def _manifest() -> dict[str, Any]:
    entries = {}
    for name, description in (("model.mlmodel", "Specification"), ("weights", "Weights")):
        path = f"{_AUTHOR}/{name}"
        entries[str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper()] = {
            "author": _AUTHOR,
            "description": f"CoreML Model {description}",
            "name": name,
            "path": path,
        }
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": next(iter(entries)),
    }
