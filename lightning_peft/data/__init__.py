"""LightningDataModules: labelled texts, plain text, instructions, and a corpus that every Python has on disk."""

from lightning_peft.data.bars import Bars
from lightning_peft.data.classification import TextClassificationData
from lightning_peft.data.docstrings import DocstringTopics
from lightning_peft.data.instructions import InstructionData
from lightning_peft.data.language_modeling import TextBlocks

__all__ = ["Bars", "DocstringTopics", "InstructionData", "TextBlocks", "TextClassificationData"]
