"""One module per line of the table in DESIGN §7, each with `async def run(plan, findings)`."""
