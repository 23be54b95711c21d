"""A zero-shot task of any text, in the form of lm-eval's: which of four pieces goes on from what was read."""

import json
import random
import re
from pathlib import Path

READ, SAID = 48, 12  # words
CHOICES = 4
TASK = """\
task: continuation
dataset_path: json
dataset_kwargs: {data_files: {test: continuation.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_questions(documents: list[str], folder: Path, count: int) -> Path:
    """Write the task into `folder`, `count` questions of the documents' paragraphs (fewer if there are no more).

    A question is a paragraph's first 48 words; the answer, its next 12; the others, three other paragraphs' words at
    the same place. Returns the task's file.
    """
    paragraphs = [one.split() for document in documents for one in re.split(r"\n\s*\n", document)]
    usable = [words for words in paragraphs if len(words) >= READ + SAID]
    draw = random.Random(0)
    draw.shuffle(usable)
    lines = []
    for place, words in enumerate(usable[:count]):
        others = draw.sample([one for at, one in enumerate(usable) if at != place], CHOICES - 1)
        answer = draw.randrange(CHOICES)
        order = [*others[:answer], words, *others[answer:]]
        choices = [" ".join(one[READ : READ + SAID]) for one in order]
        lines.append(json.dumps({"context": " ".join(words[:READ]), "choices": choices, "answer": answer}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "continuation.jsonl").write_text("".join(lines), encoding="utf-8")
    path = folder / "continuation.yaml"
    path.write_text(TASK, encoding="utf-8")
    return path
