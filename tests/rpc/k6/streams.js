// 32 gRPC streams at once, by reflection: of each, the tokens of its deltas and its terminal messages are counted.
import { Client, Stream } from 'k6/net/grpc';
import { check } from 'k6';

export const options = {
  scenarios: {
    streams: { executor: 'per-vu-iterations', vus: 32, iterations: 1, maxDuration: '120s' },
  },
  thresholds: { checks: ['rate==1'] },
};

// By method: the request for so many tokens, the token ids of a message, and whether it is terminal.
const protocols = {
  'jaxserve.v1.Inference/Generate': {
    request: (count) => ({ text: 'hello', stopping: { max_tokens: count } }),
    tokens: (message) => (message.delta ? message.delta.tokenIds : []),
    isTerminal: (message) => Boolean(message.finished),
  },
  'vllm.grpc.engine.VllmEngine/Generate': {
    request: (count) => ({ text: 'hello', stream: true, sampling_params: { max_tokens: count } }),
    tokens: (message) => (message.chunk ? message.chunk.tokenIds : []),
    isTerminal: (message) => Boolean(message.complete),
  },
};

const protocol = protocols[__ENV.METHOD];
const client = new Client();

export default () => {
  client.connect(__ENV.ADDRESS, { plaintext: true, reflect: true });
  const wanted = 20 + 7 * __VU;
  const seen = { tokens: [], terminal: 0, afterTerminal: 0, errors: 0 };
  const stream = new Stream(client, __ENV.METHOD, null);
  stream.on('data', (message) => {
    seen.afterTerminal += seen.terminal;
    seen.terminal += protocol.isTerminal(message);
    seen.tokens = seen.tokens.concat(protocol.tokens(message));
  });
  stream.on('error', () => {
    seen.errors += 1;
  });
  stream.on('end', () => {
    check(seen, {
      'every token came once, in order': (s) =>
        s.tokens.length === wanted && s.tokens.every((token, place) => token === 97 + (place % 26)),
      'one terminal message, the last': (s) => s.terminal === 1 && s.afterTerminal === 0,
      'no error': (s) => s.errors === 0,
    });
    client.close();
  });
  stream.write(protocol.request(wanted));
  stream.end();
};
