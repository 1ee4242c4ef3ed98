// Files that are dropped or chosen: sent one after another as plain bodies, with progress.
(() => {
  const zone = (event) => event.target.closest?.(".upload");
  let line = Promise.resolve();

  function add(list, file) {
    const item = document.createElement("li");
    item.innerHTML = '<span class="name"></span><span class="said soft" role="status"></span>' +
      '<button type="button">Cancel</button><div class="bar"><i></i></div>';
    item.querySelector(".name").textContent = file.name;
    item.querySelector(".said").textContent = "Waits";
    list.prepend(item);
    return item;
  }

  function send(file, item, query) {
    return new Promise((done) => {
      const request = new XMLHttpRequest();
      const said = item.querySelector(".said"), button = item.querySelector("button");
      const end = (text, kind, href) => {
        item.classList.add(kind);
        said.textContent = text;
        button.remove();
        if (href) {
          const link = document.createElement("a");
          link.href = href;
          link.textContent = file.name;
          item.querySelector(".name").replaceChildren(link);
        }
        done();
      };
      if (item.dataset.cancelled) return end("Cancelled", "bad");
      if (!file.size) return end("The file is empty.", "bad");
      button.onclick = () => request.abort();
      request.upload.onprogress = (event) => {
        const share = event.loaded / event.total;
        item.querySelector("i").style.width = `${100 * share}%`;
        said.textContent = share < 1 ? `${Math.floor(100 * share)} %` : "Storing";
      };
      request.onload = () => {
        if (request.status === 401) return location.reload();
        const answer = request.response || {};
        if (request.status !== 200) return end(answer.message || `HTTP ${request.status}`, "bad");
        end("Stored", "good", `/data/${encodeURIComponent(answer.id)}`);
        if (typeof emitEvent === "function") emitEvent("file_uploaded", answer.id);
      };
      request.onerror = () => end("The connection broke. Send the file again.", "bad");
      request.onabort = () => end("Cancelled", "bad");
      request.responseType = "json";
      request.open("PUT", `/data/upload?${query}`);
      request.send(file);
    });
  }

  function take(form, files) {
    for (const file of files) {
      // As they are at this moment: the next file may be of another kind.
      const query = new URLSearchParams({ filename: file.name });
      for (const field of form.querySelectorAll("[name]")) if (field.value.trim()) query.set(field.name, field.value.trim());
      const item = add(form.querySelector("ul"), file);
      item.querySelector("button").onclick = () => { item.dataset.cancelled = "yes"; };
      line = line.then(() => send(file, item, query));
    }
  }

  document.addEventListener("dragover", (event) => {
    if (![...(event.dataTransfer?.types || [])].includes("Files")) return;
    event.preventDefault(); // elsewhere too, or the browser would leave the page for the file
    document.querySelectorAll(".upload").forEach((form) => form.classList.toggle("over", form === zone(event)));
  });
  document.addEventListener("dragleave", (event) => zone(event)?.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    if (!event.dataTransfer?.files.length) return;
    event.preventDefault();
    const form = zone(event);
    form?.classList.remove("over");
    if (form) take(form, event.dataTransfer.files);
  });
  document.addEventListener("change", (event) => {
    if (event.target.type !== "file" || !zone(event)) return;
    take(zone(event), event.target.files);
    event.target.value = "";
  });
})();
