"""data.py --look: what was understood of somebody's files, in seconds, and nothing is written."""

from collections import Counter

import torch

from data import load_prompts, text_tasks


def look(catalogue):
    """Print, after the readers' own lines, the attributes of a catalogue, its first three items and five text tasks."""
    attributes = Counter(name for item in catalogue for name in item["attributes"])
    told = ", ".join(f"{name} ({count:,} items)" for name, count in attributes.most_common(12))
    print(
        f"attributes: {told or 'none'}; {sum(not item['text'] for item in catalogue):,} items have no text"
    )
    for item in catalogue[:3]:
        print(f"  {item['id']}  {item['title']}\n      {item['text'][:300] or '(no text)'}")
    templates = [t for t in load_prompts() if "{neighbour}" not in t[2]]  # neighbours need CF
    tasks = text_tasks(
        catalogue, ["train"] * len(catalogue), templates, torch.zeros(len(catalogue), 1), 0, 20
    )
    for task in list({task["task"]: task for task in tasks}.values())[:5]:
        print(f"  {task['task']}: {task['prompt']} -> {task['target'][:200]}")
    print("--look: nothing was written")
