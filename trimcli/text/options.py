"""What the options that name text and tokens are for: one wording for every command that has them."""

DATASET = (
    "c4, wikitext2, ptb, a FILE (.txt, .jsonl, .json.gz, .parquet), hf:NAME with a text column, or - for standard "
    "input: a text or JSON lines."
)
TOKENS = "A safetensors file (- for standard input) with an integer tensor `tokens` [nsamples, seqlen]: these samples."
BOS = (
    "Where the BOS token stands. each: at the head of every window, without which Gemma's perplexity is in the "
    "thousands. once: at the head of a whole text, as published perplexities are measured. none: nowhere. auto: each "
    "where the tokenizer puts one before a text of itself, else once."
)
CHAT = "Records hold `messages`, a list of {role, content}: render them by the tokenizer's chat template."
SEQLEN = "the smaller of 2048 and the model's positions if not given."
