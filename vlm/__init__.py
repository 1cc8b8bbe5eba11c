"""Compact vision-language models of the ALBEF / BLIP family."""
