"""The Hugging Face hub's three methods, as transformers' own models have them."""


class OnTheHub:
    """An ILM as a folder or a repository of the hub (assets/extras/hub.py)."""

    def save_pretrained(self, folder, **more):
        """Write a folder in the hub's format, without LLM and data."""
        from assets.extras import hub

        return hub.save(self, folder, **more)

    def push_to_hub(self, name, **more):
        from assets.extras import hub

        return hub.push(self, name, **more)

    @staticmethod
    def from_pretrained(name, data=None, llm=None, **more):
        """A folder or hub id -> ILM. data, llm: in place of those that its config.json names."""
        from assets.extras import hub

        return hub.load(name, data, llm, **more)
