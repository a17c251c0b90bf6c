"""Hugging Face directories: the stock `deepseek_v3` class where it can hold the result, our own class otherwise.

Importing this package registers our class with transformers' AutoConfig and AutoModelForCausalLM (see `registration`)
and imports neither torch nor transformers.
"""

from attnopt.codegen.hf.registration import install

install()
