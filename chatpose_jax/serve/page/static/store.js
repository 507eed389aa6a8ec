// The conversation and the bodies of its answers, kept in this browser (IndexedDB). Where a browser keeps nothing, they last as long as the tab.

const TALK = 'talk';
const BODIES = 'bodies';

/** Keeps {conversation} and bodies (an ArrayBuffer for each pose's id). kept: false where the browser refuses. */
export class Store {
  static async open() {
    const store = new Store();
    try {
      store.base = await new Promise((resolve, reject) => {
        const asked = indexedDB.open('chatpose', 1);
        asked.onupgradeneeded = () => [TALK, BODIES].forEach((name) => asked.result.createObjectStore(name));
        asked.onsuccess = () => resolve(asked.result);
        asked.onerror = () => reject(asked.error);
        asked.onblocked = () => reject(new Error('blocked'));
      });
    } catch {
      store.base = null;
    }
    return store;
  }

  get kept() {
    return this.base !== null;
  }

  conversation() {
    return this.#do(TALK, 'readonly', (table) => table.get('now'));
  }

  body(id) {
    return this.#do(BODIES, 'readonly', (table) => table.get(id));
  }

  save(conversation) {
    return this.#do(TALK, 'readwrite', (table) => table.put(conversation, 'now'));
  }

  saveBody(id, data) {
    return this.#do(BODIES, 'readwrite', (table) => table.put(data, id));
  }

  async clear() {
    await this.#do(TALK, 'readwrite', (table) => table.clear());
    await this.#do(BODIES, 'readwrite', (table) => table.clear());
  }

  /** The result of one operation; undefined where the browser refuses, which then keeps nothing more. */
  async #do(name, mode, operation) {
    if (!this.base) return undefined;
    try {
      return await new Promise((resolve, reject) => {
        const transaction = this.base.transaction(name, mode);
        const asked = operation(transaction.objectStore(name));
        transaction.oncomplete = () => resolve(asked.result);
        transaction.onabort = () => reject(transaction.error);
        transaction.onerror = () => reject(transaction.error);
      });
    } catch {
      this.base = null;
      return undefined;
    }
  }
}
