// What the page asks the server for. Addresses are relative, so that the page works below a path of a proxy too.

const KEY = 'chatpose-key';

/** What a request came to, if not to an answer. status: of HTTP, 0 where the server did not answer. code: the server's word for programs. */
export class Failure extends Error {
  constructor(message, { status = 0, code = null, seconds = null } = {}) {
    super(message);
    Object.assign(this, { status, code, seconds });
  }

  /** Whether the server is out of reach: it did not answer, or what stands before it did. */
  get gone() {
    return this.status === 0 || ((this.status === 502 || this.status === 504) && !this.code);
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
};

async function request(path, { signal, body } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers['Content-Type'] = 'application/json';
  const options = { method: body ? 'POST' : 'GET', headers, signal, body: body && JSON.stringify(body), credentials: 'omit' };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Failure('The server does not answer.');
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw failure(told.error ?? {}, answer.status, Number(answer.headers.get('Retry-After')) || null);
}

const failure = ({ message, code }, status, seconds) =>
  new Failure(message ?? `The server answered with status ${status}.`, { status, code: code ?? null, seconds });

/** Resolves when the server is ready; else throws a Failure with status 0 (gone) or 503 (loading, failed or about to stop). */
export const health = () => request('health');

export const models = async () => (await (await request('v1/models')).json()).data;

export const poseFile = async (id, kind) => (await request(`v1/poses/${encodeURIComponent(id)}.${kind}`)).blob();

/**
 * An answer as it is written: yields the server's deltas ({content?, poses?}), at the end {finish}.
 * Throws a Failure, also where the connection breaks before the end.
 */
export async function* answer(body, signal) {
  const reply = await request('v1/chat/completions', { signal, body: { ...body, stream: true } });
  let ended = false;
  try {
    for await (const data of events(reply.body)) {
      if (data === '[DONE]') {
        ended = true;
        break;
      }
      const value = JSON.parse(data);
      if (value.error) throw failure(value.error, 500, null);
      for (const choice of value.choices) {
        yield choice.delta;
        if (choice.finish_reason) yield { finish: choice.finish_reason };
      }
    }
  } catch (error) {
    if (error instanceof Failure || error.name === 'AbortError') throw error;
    throw new Failure('The connection broke before the answer was complete.');
  }
  if (!ended) throw new Failure('The connection ended before the answer was complete.');
}

/** The data of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = '';
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (held + value).split(/\r?\n\r?\n/);
      held = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith('data:'));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, '')).join('\n');
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
