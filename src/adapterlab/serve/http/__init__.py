"""The engine behind OpenAI's HTTP API: requests, keys, adapters, metrics.

    app = build(Service(engine, tokenizer, base="smollm2-135m", shelf=Shelf(folder)))

`fastapi`, `uvicorn` and `prometheus-client` come with the extra `serve`; this package imports none of them by itself.
"""
