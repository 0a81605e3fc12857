"""Official metrics on predictions made elsewhere: `score`."""

from pathlib import Path
from typing import Annotated

import typer

from fedex_lora.cli._shared import Debug, Json, app, consoles, one_line_errors, print_json

score = typer.Typer(no_args_is_help=True)
app.add_typer(score, name="score", help="Official metrics of predictions made elsewhere.")


@score.command()
@one_line_errors
def e2e(
    predictions: Annotated[Path, typer.Argument(help="A TSV file with columns MR and output: one row a meaning representation.")],
    references: Annotated[Path, typer.Option(help="A CSV file with columns mr and ref: testset_w_refs.csv of the challenge.")],
    metrics: Annotated[str, typer.Option(help="Comma-separated; the last three need Java.")] = "BLEU,NIST,METEOR,ROUGE_L,CIDEr",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """BLEU, NIST, METEOR, ROUGE-L and CIDEr of the E2E NLG challenge, as its official scripts compute them."""
    from fedex_lora.tasks.scoring.e2e import read_predictions, read_references, require_e2e, score_e2e

    names = [name.strip() for name in metrics.split(",")]
    require_e2e(names)
    people = read_references(references)
    texts = read_predictions(predictions, people)
    scores = score_e2e(texts, list(people.values()), names)
    empty = sum(not text.strip() for text in texts)
    if as_json:
        print_json({**scores, "texts": len(texts), "references": sum(map(len, people.values())), "empty": empty})
        return
    console = consoles(False)
    for name, value in scores.items():
        console.print(f"{name:8} {value:.4f}", highlight=False)
    if empty:
        console.print(f"! {empty} of {len(texts)} predictions are empty; they count as they are", highlight=False)
