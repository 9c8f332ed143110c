"""The network in memory: latency, slow lines, partitions."""

from contextlib import asynccontextmanager

import pytest
import trio

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectFailed, ConnectionLost
from peerd.testing.network import MemoryNetwork
from tests.fakes.channels import echo, listening, wait


@asynccontextmanager
async def _memory(**arguments):
    """A network, and a channel from 10.0.0.1 to an echo on 10.0.0.2."""
    network = MemoryNetwork(**arguments)
    async with listening(echo, network.transport("10.0.0.2"), Multiaddr("ip4", "0.0.0.0", 7)):
        yield network, await network.transport("10.0.0.1").dial(Multiaddr("ip4", "10.0.0.2", 7))


async def test_in_memory_a_message_takes_the_latency_each_way():
    async with _memory() as (network, channel):
        network.set_latency("10.0.0.1", "10.0.0.2", 0.25)
        start = trio.current_time()
        await channel.send(b"x")
        assert trio.current_time() == start
        assert await channel.receive() == b"x"
        assert trio.current_time() == start + 0.5


async def test_in_memory_a_slow_line_makes_the_sender_wait():
    async with _memory(bytes_a_second=1000.0) as (_, channel):
        start = trio.current_time()
        await channel.send(bytes(500))
        assert trio.current_time() == start + 0.5
        await channel.receive()
        assert trio.current_time() == start + 1


async def test_in_memory_a_reader_that_does_not_read_makes_the_sender_wait():
    network = MemoryNetwork()
    async with listening(wait, network.transport("10.0.0.2"), Multiaddr("ip4", "10.0.0.2", 7)) as address:
        channel = await network.transport("10.0.0.1").dial(address)
        with trio.move_on_after(1) as waited:
            for _ in range(1000):
                await channel.send(bytes(1000))
        assert waited.cancelled_caught
        network.kill("10.0.0.2")
        with pytest.raises(ConnectionLost, match="killed"):
            await channel.send(b"x")


async def test_in_memory_a_partition_tells_nobody_and_heals():
    async with _memory() as (network, channel):
        network.partition("10.0.0.1", "10.0.0.2")
        await channel.send(b"x")
        with trio.move_on_after(100) as waited:
            await channel.receive()
        assert waited.cancelled_caught
        network.heal("10.0.0.1", "10.0.0.2")
        assert await channel.receive() == b"x"


async def test_in_memory_nobody_dials_across_a_partition_or_a_closed_port():
    async with _memory() as (network, _):
        with pytest.raises(ConnectFailed, match="refused"):
            await network.transport("10.0.0.1").dial(Multiaddr("ip4", "10.0.0.2", 8))
        network.partition("10.0.0.1", "10.0.0.2")
        with pytest.raises(trio.TooSlowError), trio.fail_after(100):
            await network.transport("10.0.0.1").dial(Multiaddr("ip4", "10.0.0.2", 7))


async def test_in_memory_what_was_sent_before_closing_is_still_received():
    async def say_and_close(channel):
        await channel.send(b"bye")

    network = MemoryNetwork(latency_s=0.1)
    async with listening(say_and_close, network.transport("10.0.0.2"), Multiaddr("ip4", "10.0.0.2", 0)) as address:
        channel = await network.transport("10.0.0.1").dial(address)
        assert await channel.receive() == b"bye"
        with pytest.raises(ConnectionLost, match="closed"):
            await channel.receive()
        with pytest.raises(OSError, match="in use"):
            network.bind("10.0.0.2", address.port, None, echo)
