"""Put trained weights into the pack: metadata completed, catalogue entry written.

python tools/bundle.py runs/light_x2/best.safetensors light_x2
python tools/bundle.py runs/light_x3/best.safetensors light_x3 "after those of light_x2"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pft_arch import load_model
from pft_arch.catalogue import BUNDLED
from pft_arch.weights import describe, save_model

LICENCE = "Apache-2.0"
CITATION = "arXiv 2503.20337"
DATA = "1,134 tiles of images with free licences, listed in bundled/README.md"


def main() -> None:
    source, name = Path(sys.argv[1]), sys.argv[2]
    facts = describe(source)
    reached = json.loads(facts["metadata"]["training"])["reached"]
    before = " " + sys.argv[3] if len(sys.argv) > 3 else ""
    steps = f"{reached['iteration']:,} iterations{before}"
    training = f"{DATA}; {steps}; Set5 {reached['psnr_y']:.2f} dB PSNR-Y while training"
    target = BUNDLED / f"{name}.safetensors"
    metadata = {**facts["metadata"], "name": name, "licence": LICENCE, "citation": CITATION, "data": DATA}
    save_model(load_model(source), target, metadata)
    written = describe(target)

    catalogue = BUNDLED / "catalogue.json"
    entry = {
        "name": name,
        "preset": facts["preset"],
        "scale": facts["scale"],
        "source": "bundled",
        "file": target.name,
        "size": written["bytes"],
        "sha256": written["sha256"],
        "licence": LICENCE,
        "training": training,
        "citation": CITATION,
    }
    others = [other for other in json.loads(catalogue.read_text("utf-8")) if other["name"] != name]
    bundled = [other for other in others if other["source"] == "bundled"]
    rest = [other for other in others if other["source"] != "bundled"]
    entries = [*sorted([*bundled, entry], key=lambda other: str(other["name"])), *rest]
    catalogue.write_text(json.dumps(entries, indent=2) + "\n", "utf-8")
    print(json.dumps(entry, indent=2))


if __name__ == "__main__":
    main()
