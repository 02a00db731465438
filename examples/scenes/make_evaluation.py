"""Writes the evaluation set of the demonstration model: 64 scenes as JPEG files, and their questions.

    python examples/scenes/make_evaluation.py examples/scenes      (needs matplotlib, for its fonts)

Seeds 0 to 63; training draws seeds from 10,000,000 on.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

import scenes

SCENES = 64

if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "images").mkdir(parents=True, exist_ok=True)
    with (out / "questions.jsonl").open("w") as file:
        for seed in range(SCENES):
            image, scene = scenes.draw_scene(seed)
            name = f"images/scene-{seed:02d}.jpg"
            image.save(out / name, quality=95)
            for task, question, answer in scenes.questions(seed, scene):
                file.write(json.dumps({"image": name, "question": question, "answer": answer, "task": task}) + "\n")
