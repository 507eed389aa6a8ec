// The conversation: what it is made of, what of it the server gets, and how it looks.

import { make, plural } from './dom.js';

/**
 * @typedef {object} Message
 * @property {'user'|'assistant'} role
 * @property {string} text
 * @property {string[]} [pictures] data: addresses; of a user
 * @property {object[]} [poses] as the server's JSON has them; of an answer
 * @property {'writing'|'done'|'stopped'|'failed'} [state] of an answer
 * @property {?string} [fault] why it failed
 * @property {?string} [finish] the server's finish_reason
 */

const POSE = '<POSE>';

/** Every body of a conversation: {id, label, json, message, file}. file: whether the server may have files of it. Further samples of a pose follow it. */
export function bodiesOf(messages) {
  const bodies = [];
  let number = 0;
  for (const message of messages) {
    for (const pose of message.poses ?? []) {
      number += 1;
      const { samples = [{}], ...json } = pose;
      samples.forEach((sample, k) => {
        const id = k ? (sample.id ?? `${pose.id}+${k}`) : pose.id;
        const label = `Pose ${number}${samples.length > 1 ? `, sample ${k + 1}` : ''}`;
        bodies.push({ id, label, number, json: { ...json, ...sample, id }, message, file: k === 0 || Boolean(sample.id) });
      });
    }
  }
  return bodies;
}

/** What the server gets of a conversation. A question without an answer is left out, except the last one. */
export function asRequest(messages) {
  const sent = [];
  messages.forEach((message, k) => {
    if (message.role !== 'user') return;
    const answer = messages[k + 1];
    const last = k >= messages.length - 2 && answer?.state === 'writing';
    if (!last && (!answer || answer.state === 'failed')) return;
    const pictures = message.pictures.map((url) => ({ type: 'image_url', image_url: { url } }));
    sent.push({ role: 'user', content: pictures.length ? [...pictures, { type: 'text', text: message.text }] : message.text });
    if (!last) sent.push({ role: 'assistant', content: answer.text });
  });
  return sent;
}

/** The element of a message, drawn anew. on: {retry(message), pick(body), card(body) -> element}. */
export function draw(message, bodies, element, on) {
  const own = bodies.filter((body) => body.message === message);
  element.className = `message ${message.role}`;
  element.setAttribute('aria-label', message.role === 'user' ? 'You' : 'Answer');
  element.setAttribute('aria-busy', String(message.state === 'writing'));
  const parts = (message.pictures ?? []).map((src, k) => make('img', { src, alt: `Picture ${k + 1} of your question` }));
  parts.push(make('p', { className: `text${message.state === 'writing' ? ' writing' : ''}` }, ...words(message, own, on)));
  if (own.length) parts.push(make('div', { className: 'cards' }, ...own.map((body) => on.card(body))));
  const note = noteOf(message);
  if (note) parts.push(make('p', { className: 'note' }, note));
  if (message.fault) {
    const again = make('button', { type: 'button', className: 'quiet', onclick: () => on.retry(message) }, 'Try again');
    parts.push(make('div', { className: 'fault' }, make('span', {}, message.fault), again));
  }
  element.replaceChildren(...parts);
}

function words(message, own, on) {
  if (message.role === 'user') return [message.text];
  const firsts = own.filter((body, k) => body.number !== own[k - 1]?.number);
  const pieces = message.text.split(POSE);
  const bare = pieces.every((piece) => !piece.trim());
  if (bare) return [];
  return pieces.flatMap((piece, k) => {
    if (k === 0) return [piece];
    const body = firsts[k - 1];
    const name = body ? `pose ${body.number}` : 'pose';
    const mention = body ? make('button', { type: 'button', className: 'mention', onclick: () => on.pick(body) }, name) : name;
    return [mention, piece];
  });
}

function noteOf({ role, state, finish, text, poses, fault }) {
  if (role === 'user' || state === 'writing' || fault) return null;
  if (state === 'stopped') return 'You stopped this answer.';
  if (finish === 'length') return 'The answer was cut off: it has as many tokens as the settings allow.';
  if (!text && !poses.length) return 'The answer is empty.';
  return null;
}

/** An answer for those who hear the page. */
export function spoken(message, bodies) {
  const own = bodies.filter((body) => body.message === message);
  const text = message.text.replaceAll(POSE, 'pose').trim() || 'no words';
  return `Answer: ${/[.!?]$/.test(text) ? text : `${text}.`} ${own.length ? `${plural(own.length, 'body').replace('bodys', 'bodies')} in the 3D view.` : 'No body.'}`;
}
