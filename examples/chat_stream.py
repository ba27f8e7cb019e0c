"""A conversation on the terminal, each answer printed as it is generated. An empty line ends it.

Uses the checkpoint's chat template. The bundled model has none, and is no chat model: it gets the messages as comments
of a Python file and goes on with it.

python examples/chat_stream.py [--model bundled] [--max-tokens 64] [--message TEXT]
"""

from __future__ import annotations

import argparse

from specdec import Engine, SamplingParams

Messages = list[dict[str, str]]


def prompt_of(engine: Engine, messages: Messages) -> str:
    if engine.tokenizer.chat_template is not None:
        return engine.tokenizer.apply_chat_template(messages)
    turns = [f"# {m['content']}\n" if m["role"] == "user" else m["content"].rstrip() + "\n\n" for m in messages]
    return "".join(turns)


def answer(engine: Engine, messages: Messages, params: SamplingParams) -> str:
    """Streams the assistant's turn; Ctrl-C ends it early."""
    text = ""
    stream = engine.stream(prompt_of(engine, messages), params)
    try:
        for chunk in stream:
            text += chunk.text
            print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        stream.close()
    print()
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--message", action="append", help="in place of the terminal; may be repeated")
    args = parser.parse_args()

    engine = Engine.from_pretrained(args.model)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.6)
    messages: Messages = []
    for message in args.message or iter(lambda: input("> "), ""):
        messages.append({"role": "user", "content": message})
        messages.append({"role": "assistant", "content": answer(engine, messages, params)})


if __name__ == "__main__":
    main()
