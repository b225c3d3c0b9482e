// The text of the service definitions that start `caravan serve` at login: a systemd user unit, a launchd agent. Pure.

/** What both are called by their managers. */
export const SYSTEMD_NAME = "caravan.service";
export const LAUNCHD_LABEL = "ai.caravan.serve";

/** A word of ExecStart: quoted, with systemd's own specials ($, %) doubled (systemd.service(5), "Command lines"). */
function systemdWord(word: string): string {
  const escaped = word
    .replaceAll("\\", "\\\\")
    .replaceAll('"', '\\"')
    .replaceAll("%", "%%")
    .replaceAll("$", "$$$$")
    .replaceAll("\n", "\\n");
  return /^[\w./:=@+,-]+$/.test(escaped) ? escaped : `"${escaped}"`;
}

/** The node ends in order within its own drain limit; the manager waits a little longer. */
export function systemdUnit(command: readonly string[], drainSeconds: number): string {
  return `[Unit]
Description=caravan: Llama 4 on this machine and others
After=network-online.target

[Service]
ExecStart=${command.map(systemdWord).join(" ")}
Restart=on-failure
RestartSec=5
TimeoutStopSec=${drainSeconds + 10}

[Install]
WantedBy=default.target
`;
}

function xml(text: string): string {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

export function launchdAgent(command: readonly string[], drainSeconds: number, logFile: string): string {
  const words = command.map((word) => `    <string>${xml(word)}</string>`).join("\n");
  return `<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
  <key>Label</key>
  <string>${LAUNCHD_LABEL}</string>
  <key>ProgramArguments</key>
  <array>
${words}
  </array>
  <key>RunAtLoad</key>
  <true/>
  <key>KeepAlive</key>
  <dict>
    <key>SuccessfulExit</key>
    <false/>
  </dict>
  <key>ExitTimeOut</key>
  <integer>${drainSeconds + 10}</integer>
  <key>ProcessType</key>
  <string>Interactive</string>
  <key>StandardOutPath</key>
  <string>${xml(logFile)}</string>
  <key>StandardErrorPath</key>
  <string>${xml(logFile)}</string>
</dict>
</plist>
`;
}
