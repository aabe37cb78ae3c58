"""Every word the model knows, and the colours' values in RGB."""

from typing import Final

COLOURS: Final = {
    "red": (225, 35, 35),
    "green": (35, 185, 50),
    "blue": (55, 85, 250),
    "yellow": (240, 230, 45),
    "magenta": (225, 45, 215),
    "cyan": (45, 220, 230),
    "orange": (250, 140, 25),
    "white": (245, 245, 245),
    "pink": (255, 165, 185),
}
NUMBERS: Final = tuple(str(n) for n in range(10))
BOS, EOS, PAD, UNK, IMAGE = SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "<image>")
USER, ASSISTANT = "user:", "assistant:"
VOCABULARY: Final = (
    *SPECIAL,
    *(USER, ASSISTANT, "?", ",", "."),
    *NUMBERS,
    *COLOURS,
    *("yes", "no"),
    *("which", "what", "how", "many", "is", "are", "there", "the", "a", "or", "describe"),
    *("digit", "digits", "colour", "even", "greater", "leftmost", "rightmost", "highest", "lowest"),
)
