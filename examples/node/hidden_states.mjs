// Hidden states from a swarm, in Node: what `peerd --client` offers at /peerd/v1/session (spec/local-api.md).
//
//   npm install
//   node hidden_states.mjs --socket $XDG_RUNTIME_DIR/peerd.sock --model NAME --tokens 1,2,3 --end 6
//
// Prints what blocks 0 to end-1 make of the tokens: one list of numbers a token, as JSON. Node's own WebSocket
// cannot dial a unix socket, so the few lines of framing that it takes are here.
import { decode, encode } from "@msgpack/msgpack";
import { randomBytes } from "node:crypto";
import { request } from "node:http";
import { parseArgs } from "node:util";

const { values: args } = parseArgs({
  options: {
    socket: { type: "string" },
    model: { type: "string" },
    tokens: { type: "string" },
    end: { type: "string", default: "0" },
  },
});
const tokens = args.tokens.split(",").map(Number);

const connection = await connect(args.socket);
const messages = readMessages(connection);
try {
  const opened = await ask({ type: "open", model: args.model, max_length: tokens.length, end: Number(args.end) });
  const embedded = await ask({ type: "embed", seq: 1, token_ids: tokens });
  const step = { type: "step", epoch: 0, seq: 2, rows: [[0, 0, tokens.length]], want: "all" };
  const answer = await ask({ ...step, tensor: embedded.header.tensor }, embedded.body);
  console.log(JSON.stringify(rows(answer, opened.header.hidden_size)));
} finally {
  connection.end();
}

// One request, one answer.
async function ask(header, body = Buffer.alloc(0)) {
  connection.write(frame(message(header, body)));
  const { value, done } = await messages.next();
  if (done) throw new Error("the daemon closed the session");
  if (value.header.type === "error") throw new Error(`${value.header.code}: ${value.header.message}`);
  return value;
}

function rows({ header, body }, width) {
  if (header.tensor.dtype !== "float32") throw new Error(`this example reads float32, not ${header.tensor.dtype}`);
  const numbers = Array.from({ length: body.length / 4 }, (_, index) => body.readFloatLE(4 * index));
  return Array.from({ length: numbers.length / width }, (_, row) => numbers.slice(row * width, (row + 1) * width));
}

// The wire's messages: header length, header in msgpack, body length, body (spec/connection/wire.md).
function message(header, body) {
  const packed = encode(header);
  const [headerLength, bodyLength] = [Buffer.alloc(4), Buffer.alloc(4)];
  headerLength.writeUInt32BE(packed.length);
  bodyLength.writeUInt32BE(body.length);
  return Buffer.concat([headerLength, packed, bodyLength, body]);
}

function parse(data) {
  const headerEnd = 4 + data.readUInt32BE(0);
  return { header: decode(data.subarray(4, headerEnd)), body: data.subarray(headerEnd + 4) };
}

// WebSocket, as far as a client of peerd needs it (RFC 6455): whole binary messages, no extensions.
function connect(socketPath) {
  const headers = {
    Connection: "Upgrade",
    Upgrade: "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": randomBytes(16).toString("base64"),
  };
  return new Promise((resolve, reject) => {
    const upgrade = request({ socketPath, path: "/peerd/v1/session", headers: { Host: "localhost", ...headers } });
    upgrade.on("upgrade", (_, socket) => resolve(socket));
    upgrade.on("response", ({ statusCode }) => reject(new Error(`the daemon answered ${statusCode}`)));
    upgrade.on("error", reject);
    upgrade.end();
  });
}

function frame(data) {
  const mask = randomBytes(4);
  const masked = data.map((byte, index) => byte ^ mask[index % 4]);
  return Buffer.concat([Buffer.from([0x82]), lengthBytes(data.length), mask, masked]);
}

// As short as it can be, which the RFC asks for.
function lengthBytes(length) {
  if (length < 126) return Buffer.from([0x80 | length]);
  const bytes = Buffer.alloc(length < 65536 ? 3 : 9);
  bytes[0] = 0x80 | (length < 65536 ? 126 : 127);
  if (length < 65536) bytes.writeUInt16BE(length, 1);
  else bytes.writeBigUInt64BE(BigInt(length), 1);
  return bytes;
}

async function* readMessages(socket) {
  let buffer = Buffer.alloc(0);
  let parts = [];
  for await (const chunk of socket) {
    buffer = Buffer.concat([buffer, chunk]);
    for (let found; (found = takeFrame(buffer)); buffer = found.rest) {
      if (found.opcode === 8) return;
      if (found.opcode > 8) continue;
      parts.push(found.payload);
      if (found.final) {
        yield parse(Buffer.concat(parts));
        parts = [];
      }
    }
  }
}

function takeFrame(buffer) {
  if (buffer.length < 2) return null;
  let [length, start] = [buffer[1] & 127, 2];
  if (length === 126) [length, start] = [buffer.length < 4 ? Infinity : buffer.readUInt16BE(2), 4];
  else if (length === 127) [length, start] = [buffer.length < 10 ? Infinity : Number(buffer.readBigUInt64BE(2)), 10];
  if (buffer.length < start + length) return null;
  const payload = buffer.subarray(start, start + length);
  return { final: buffer[0] >= 128, opcode: buffer[0] & 15, payload, rest: buffer.subarray(start + length) };
}
