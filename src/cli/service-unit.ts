// The text of the service definitions that start `caravan serve` at login or at boot: a systemd user unit, a launchd agent, a
// launchd daemon that runs as a user. Pure.

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

/** Who a launchd daemon runs as, and where that user's home is: a daemon is given neither by launchd. */
export interface DaemonUser {
  name: string;
  home: string;
}

/** An agent of the user who is logged in, or with `user` a daemon that the system starts at boot, as that user. */
export function launchdAgent(
  command: readonly string[],
  drainSeconds: number,
  logFile: string,
  user?: DaemonUser,
): string {
  const as =
    user === undefined
      ? ""
      : `
  <key>UserName</key>
  <string>${xml(user.name)}</string>
  <key>EnvironmentVariables</key>
  <dict>
    <key>HOME</key>
    <string>${xml(user.home)}</string>
  </dict>`;
  const words = command.map((word) => `    <string>${xml(word)}</string>`).join("\n");
  return `<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
  <key>Label</key>
  <string>${LAUNCHD_LABEL}</string>${as}
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

/** A word of a command that a person copies into a shell. */
export function shellWord(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

/** The commands, for a person with the right to, that have a Mac start the daemon of `plist` at boot, and that undo it. */
export function daemonCommands(plist: string): { install: string[]; remove: string[] } {
  const place = `/Library/LaunchDaemons/${LAUNCHD_LABEL}.plist`;
  return {
    install: [
      `sudo install -o root -g wheel -m 644 ${shellWord(plist)} ${place}`,
      `sudo launchctl bootstrap system ${place}`,
    ],
    remove: [`sudo launchctl bootout system/${LAUNCHD_LABEL}`, `sudo rm ${place}`],
  };
}
