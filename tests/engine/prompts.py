"""Sixteen prompts of different kinds and lengths for the embedded model."""

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "def fibonacci(n):\n    ",
    "Explain why the sky is blue to a child of six.",
    "List five fruits, one on each line.",
    "Translate to German: the house is small and the garden is green.",
    "1, 1, 2, 3, 5, 8, 13,",
    "Once upon a time, in a village by a river,",
    "Q: How many legs does a spider have?\nA:",
    "The three laws of motion were stated by",
    "Dear Sir or Madam,\n\nI am writing to",
    "SELECT name, age FROM people WHERE",
    "In the year 1969, two men walked on the",
    "To bake bread you need flour, water, salt and",
    "日本の首都は",
    "The recipe is simple. " * 12 + "First,",
)
