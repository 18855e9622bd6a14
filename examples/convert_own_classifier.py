"""Converts a classifier of one's own on the table that it was trained on, then trains the converted one further.

The table is a CSV file with columns such as `text` and `label`; the classifier a folder or a Hub id.

python examples/convert_own_classifier.py CLASSIFIER TABLE OUTPUT
"""

import sys
import tempfile

from transformers import Trainer, TrainingArguments

from fffconvert import DataSource, convert, distill, evaluate, load, read_data


def main(classifier: str, table: str, output: str) -> None:
    teacher = load(classifier)
    tokenizer = teacher.tokenizer
    data = read_data(DataSource(table), tokenizer, teacher.model, held_out=20)
    student = convert(teacher.model, tokenizer, data.texts).model
    distill(student, teacher.model, tokenizer, data.rows)
    scores = evaluate(student, tokenizer, data.task, data.validations, teacher.model)
    print(f"{scores.metric} {scores.score:.3f}, agreement with the teacher {scores.agreement:.3f}")

    with tempfile.TemporaryDirectory() as folder:  # an ordinary model: Trainer takes it
        settings = TrainingArguments(folder, num_train_epochs=1, report_to=[], save_strategy="no")
        Trainer(student, settings, train_dataset=data.rows, processing_class=tokenizer).train()
    student.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
