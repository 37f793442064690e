"""data.py --look: what was understood of somebody's files, in seconds, and nothing is written."""

import re


def look_at(catalogue, tasks):
    """Print, after the readers' own lines, the attributes of a catalogue, its first three items and
    five of its text tasks."""
    values = {}
    for item in catalogue:
        for name, value in item["attributes"].items():
            values.setdefault(name, []).append(value)
    print(f"attributes: {'' if values else 'none'}")
    for name, found in list(values.items())[:12]:
        numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", value) for value in found)
        print(f"  {name}: {'numbers' if numbers else 'text'}, of {len(found):,} items")
    print(f"items: {sum(not item['text'] for item in catalogue):,} have no text; the first three")
    for item in catalogue[:3]:
        print(f"  {item['id']}  {item['title']}\n      {item['text'][:300] or '(no text)'}")

    by_name = {task["task"]: task for task in tasks}
    print(f"text tasks: {len(by_name)} kinds; the first five")
    for name, task in list(by_name.items())[:5]:
        about = ", ".join(catalogue[i]["id"] for i in task["items"])
        print(f"  {name} ({about}): {task['prompt']} -> {task['target'][:200]}")
    print("--look: nothing was written")
