import trio


async def test_simulated_hours_pass_at_once():
    start = trio.current_time()
    await trio.sleep(7200)
    assert trio.current_time() - start >= 7200
