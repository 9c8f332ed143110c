"""What clients get of a server's device."""


async def test_a_client_that_gave_us_something_has_a_share_of_its_own_on_the_device(open_swarm):
    async with open_swarm() as swarm:
        giver, stranger = await swarm.caller(), await swarm.caller()
        host = await swarm.serve(0, 4, weight_of=lambda peer: 8.0 if peer == giver.identity.peer_id else 1.0)
        for caller in (giver, stranger):
            await caller.open(host)
        sessions = host.server.spans[0].task.engine._scheduler._sessions.values()
        assert sorted(session.weight for session in sessions) == [1.0, 8.0]
        assert giver.identity.peer_id in {session.owner for session in sessions}
