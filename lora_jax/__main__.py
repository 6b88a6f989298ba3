"""`python -m lora_jax` is `lora-jax`."""

from lora_jax._cli.main import main

if __name__ == "__main__":
    main()
