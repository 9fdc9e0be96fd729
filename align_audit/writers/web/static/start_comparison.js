/* Of a comparison as a file: its data stands in the page. */
(function () {
  "use strict";
  const root = document.getElementById("align-audit");
  const data = JSON.parse(document.getElementById("align-audit-data").textContent);
  AlignAuditComparison.render(root, data.sides, data.said, { when: data.written });
  AlignAudit.printing(root);
})();
