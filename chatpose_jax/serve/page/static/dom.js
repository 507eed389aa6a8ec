/** The element with this id. */
export const the = (id) => document.getElementById(id);

/** A new element: its properties (``dataset`` and names with a dash as attributes), then its children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === 'dataset') Object.assign(element.dataset, value);
    else if (name.includes('-')) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Says something to those who hear the page. */
export function say(text) {
  the('status').textContent = '';
  requestAnimationFrame(() => (the('status').textContent = text));
}

export const plural = (count, word) => `${count} ${word}${count === 1 ? '' : 's'}`;
