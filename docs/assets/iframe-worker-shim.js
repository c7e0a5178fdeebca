/*
 * Search for a site that is opened from a disk.
 *
 * The theme searches in a web worker, and browsers refuse workers to pages of file:// addresses. There a hidden
 * frame takes the worker's place: it runs the worker's script, and messages are handed from one window to the
 * other. The theme looks for the name IFrameWorker to find its language files.
 */
(function () {
  "use strict";

  if (location.protocol !== "file:") {
    return;
  }

  class FrameWorker extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = null;
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      // What a worker calls in its global scope.
      inside.postMessage = (data) => queueMicrotask(() => this.receive(data));
      inside.importScripts = async (...urls) => {
        for (const each of urls) {
          await this.load(each);
        }
      };
      this.started = this.load(url);
    }

    load(url) {
      return new Promise((resolve, reject) => {
        const script = this.frame.contentDocument.createElement("script");
        script.src = String(url);
        script.onload = resolve;
        script.onerror = () => reject(new Error(`${url} cannot be loaded`));
        this.frame.contentDocument.body.append(script);
      });
    }

    receive(data) {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      if (this.onmessage) {
        this.onmessage(event);
      }
    }

    async postMessage(data) {
      await this.started;
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data: structuredClone(data) }));
    }

    terminate() {
      this.frame.remove();
    }
  }

  window.IFrameWorker = FrameWorker;
  window.Worker = FrameWorker;
})();
