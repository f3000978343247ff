"""Few-shot text with a model of Hugging Face's transformers: which word is missing? (needs the extra ``[hf]``)

A task has three words, such as "and", "thy" and "not", that were in no training task, and lines of text in which the
word is masked: two lines a word to learn from, five to judge by. Lines have unequal lengths, so token ids come with an
attention mask; the learner gives both to the model by keyword. Two choices of what adapts stand side by side: the head,
and low-rank factors beside the attention's queries and values and beside the head (`il.LoRA`).

    python examples/hugging_face.py

40 seconds on one CPU thread, printed last:

    head: test accuracy 0.381 on words never seen, chance 0.333
    lora: test accuracy 0.371 on words never seen, chance 0.333

The model is a BERT of two layers with random weights, so that nothing is downloaded, and the text is short: this shows
how it is done, not what a pretrained model would reach. `from_pretrained` works the same.
"""

import re
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import innerloop as il

WAYS, BEFORE, AFTER, LEAST = 3, 4, 3, 12  # words shown on either side, and how often a word must occur
PAD, MASK = 0, 1


def missing_words() -> il.tasks.Episodes:
    """Of each frequent word the places where it stands, without it."""
    lines = (Path(__file__).parent / "text.txt").read_text("utf-8").lower().splitlines()
    words = [re.findall(r"[a-z']+", line) for line in lines]
    counts = Counter(word for line in words for word in line)
    code = {word: number for number, word in enumerate(counts, start=2)}
    rows, labels = [], []
    for line in words:
        for place, word in enumerate(line):
            if counts[word] >= LEAST:
                shown = [*line[max(0, place - BEFORE) : place], None, *line[place + 1 : place + 1 + AFTER]]
                rows.append(torch.tensor([MASK if each is None else code[each] for each in shown]))
                labels.append(word)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    return il.tasks.arrays(inputs, labels, ways=WAYS, shots=2, queries=5, name="missing words")


def model(vocabulary: int) -> nn.Module:
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=WAYS, pad_token_id=PAD,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def main(steps: int = 200, test_tasks: int = 100) -> dict[str, float]:
    tasks, found = missing_words(), {}
    vocabulary = int(tasks.image_set.images["input_ids"].max()) + 1
    for name, adapts in {"head": il.Head(), "lora": il.LoRA(4, "*.query", "*.value", "classifier")}.items():
        torch.manual_seed(0)
        learner = il.MetaLearner(model(vocabulary), adapts, il.SGD(lr=0.5, steps=3), chunk_size=1)
        optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
        for step, batch in enumerate(tasks.train(tasks_per_batch=4, steps=steps)):
            optimizer.zero_grad()
            metrics = learner.meta_step(batch)
            optimizer.step()
            if step % 50 == 0:
                print(f"{name}, step {step}: accuracy {metrics.accuracy:.2f}")
        accuracy = [learner.eval().evaluate(batch).accuracy for batch in tasks.test(test_tasks)]
        found[name] = torch.cat(accuracy).mean().item()
        print(f"{name}: test accuracy {found[name]:.3f} on words never seen, chance {1 / WAYS:.3f}")
    return found


if __name__ == "__main__":
    main()
