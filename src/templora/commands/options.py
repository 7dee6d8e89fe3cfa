"""Options that several commands share, so that one word means one thing on all of them."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="novelist, a folder, a GGUF file, or a hub id.")]
RecipeName = Annotated[str, typer.Option(help="default, paper, or a YAML file.")]
Pairs = Annotated[list[str] | None, typer.Option("--set", help="Recipe key=value; may be repeated.")]
Window = Annotated[int | None, typer.Option(help="Tokens visible before a chunk; else the recipe's.")]
Context = Annotated[
    int | None, typer.Option(help="Tokens visible while a chunk is learned; else as the window.")
]
Batch = Annotated[int, typer.Option(min=1, help="How many texts at once, each with its adapter.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or 4bit.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …")]
