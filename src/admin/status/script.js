"use strict";

// Refreshes the page every two seconds while it is visible: fetches it and changes what differs, which keeps focus,
// selection and scroll position.
(() => {
  const PAUSE = 2000;
  const TIMEOUT = 5000;
  const live = document.getElementById("live");
  let timer;

  const morph = (old, now) => {
    if (old.nodeType !== now.nodeType || old.nodeName !== now.nodeName) {
      old.replaceWith(now);
      return;
    }
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.data !== now.data) old.data = now.data;
      return;
    }
    for (const { name } of [...old.attributes]) {
      if (!now.hasAttribute(name)) old.removeAttribute(name);
    }
    for (const { name, value } of now.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    const [before, after] = [[...old.childNodes], [...now.childNodes]];
    after.forEach((node, index) => {
      if (index < before.length) morph(before[index], node);
      else old.append(node);
    });
    before.slice(after.length).forEach((node) => node.remove());
  };

  const show = (state, text) => {
    live.dataset.state = state;
    if (live.textContent !== text) live.textContent = text;
  };

  const refresh = async () => {
    timer = undefined;
    if (document.hidden) return;
    try {
      const answer = await fetch("/", {
        cache: "no-store",
        headers: { accept: "text/html" },
        signal: AbortSignal.timeout(TIMEOUT),
      });
      if (!answer.ok) throw new Error(answer.statusText);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      morph(document.getElementById("page"), page.getElementById("page"));
      document.title = page.title;
      show("live", "Live");
    } catch {
      if (live.dataset.state !== "lost") {
        show("lost", `No answer since ${new Date().toISOString().slice(11, 19)} UTC`);
      }
    }
    timer = setTimeout(refresh, PAUSE);
  };

  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && timer === undefined) refresh();
  });
  show("live", "Live");
  timer = setTimeout(refresh, PAUSE);
})();
