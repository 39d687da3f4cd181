// merlon store restore and migrate: the two that write a store.

package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"merlon.dev/ca"
	"merlon.dev/ca/internal/offline"
)

// restoredJSON is `merlon store restore -o json`.
type restoredJSON struct {
	Backup   backupJSON `json:"backup"`
	Place    string     `json:"place"`
	Lossless bool       `json:"lossless"`
	// Keys were restored.
	Keys uint64 `json:"keys"`
	// The store goes on above Revision.
	Revision        uint64    `json:"revision"`
	DroppedTokens   int       `json:"dropped_tokens"`
	DroppedReplicas []string  `json:"dropped_replicas"`
	Since           []actJSON `json:"since"`
}

// actJSON is an act that a restore takes back.
type actJSON struct {
	Time  time.Time `json:"time"`
	Actor string    `json:"actor"`
	What  string    `json:"what"`
	Who   string    `json:"who,omitempty"`
}

func actsJSON(acts []offline.Act) []actJSON {
	out := make([]actJSON, 0, len(acts))
	for _, a := range acts {
		out = append(out, actJSON{a.Time, a.Actor, a.What, a.Who})
	}
	return out
}

func storeRestore(o *options) *cobra.Command {
	var config string
	var opts offline.RestoreOptions
	cmd := &cobra.Command{
		Use:   "restore FILE --config FILE [--replaces FOLDER | --accept-loss]",
		Short: "Fill the empty store of a CA that is stopped from a backup",
		Long: `Fill the empty store of a CA that is stopped from a backup: Badger or etcd, as
its configuration says, whichever the backup was taken from.

What was written after the backup is lost: entries, agents and revocations.
Without --accept-loss the command refuses, and lists from the audit log what
administrators have done since, unless --replaces names the store that is
replaced and that one held what is in the backup. With a loss the store goes
on 4294967296 revisions higher, so that serial numbers, revocations and what
agents remember stay in order; join tokens and the records of replicas other
than the root holder are left out, because a token that was used since would
work again and a replica that was evicted since would be one again. The CA
numbers trust bundle and policies anew when it starts.`,
		Example: `  mv /var/lib/merlon/ca/store /var/lib/merlon/ca/store.old
  merlon store restore /backup/last.backup --config /etc/merlon/ca.yaml --replaces /var/lib/merlon/ca/store.old
  merlon store restore /backup/last.backup --config /etc/merlon/ca.yaml --accept-loss`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if config == "" {
				return usageError{"say which CA's store to fill", "merlon store restore FILE --config /etc/merlon/ca.yaml"}
			}
			cfg, err := readStoreConfig(config, "")
			if err != nil {
				return err
			}
			done, err := offline.Restore(cmd.Context(), cfg, args[0], opts)
			if loss, ok := errors.AsType[*offline.LossError](err); ok {
				printActs(cmd.ErrOrStderr(), "since the backup, says the audit log:", loss.Since)
				return hintError{err, "use a newer backup; or name the store that it replaces with --replaces; or add --accept-loss. Nothing was changed"}
			}
			if err != nil {
				return storeHint(notThere(err, "name a file that merlon store backup has written"))
			}
			return o.printRestored(cmd, done)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&config, "config", "", "the configuration file of the CA, which is stopped")
	fl.StringVar(&opts.Replaces, "replaces", "", "folder of the Badger store that is replaced, moved away: if it has nothing newer, nothing is lost")
	fl.BoolVar(&opts.AcceptLoss, "accept-loss", false, "go on without what was written after the backup")
	return cmd
}

func (o *options) printRestored(cmd *cobra.Command, r offline.Restored) error {
	if o.output == "json" {
		replicas := r.Replicas
		if replicas == nil {
			replicas = []string{}
		}
		since := r.Since
		if r.Lossless {
			since = nil
		}
		return printJSON(cmd.OutOrStdout(), restoredJSON{
			newBackupJSON(r.Backup), r.Place, r.Lossless, r.Keys, r.Revision, len(r.Tokens), replicas, actsJSON(since),
		})
	}
	lost := "everything after revision " + strconv.FormatUint(r.Backup.Revision, 10)
	if r.Lossless {
		lost = "nothing"
	}
	if err := printFields(cmd.OutOrStdout(), "restored", r.Backup.Place, "place", r.Place, "keys", nonzero(r.Keys), "lost", lost,
		"goes_on_above", nonzero(r.Revision), "dropped_tokens", nonzero(uint64(len(r.Tokens))), "dropped_replicas", joined(r.Replicas, 5)); err != nil {
		return err
	}
	stderr := cmd.ErrOrStderr()
	if r.Lossless {
		_, err := fmt.Fprintln(stderr, "hint: start the CA")
		return err
	}
	printActs(stderr, "done after the backup, and now undone, says the audit log:", r.Since)
	_, err := fmt.Fprintln(stderr, "hint: start the CA, then look at merlon entry list and merlon agent list: revoke and delete again what was; agents that joined since, and replicas, need a new token")
	return err
}

// shownActs is how many acts people are shown; JSON has them all.
const shownActs = 20

func printActs(w io.Writer, heading string, acts []offline.Act) {
	if len(acts) == 0 {
		return
	}
	fmt.Fprintln(w, heading)
	for _, a := range acts[:min(len(acts), shownActs)] {
		fmt.Fprintf(w, "  %s  %s  %s  %s\n", a.Time.Format(time.RFC3339), a.Actor, a.What, a.Who)
	}
	if more := len(acts) - shownActs; more > 0 {
		fmt.Fprintf(w, "  and %d more\n", more)
	}
}

// migratedJSON is `merlon store migrate -o json`.
type migratedJSON struct {
	From     string `json:"from"`
	To       string `json:"to"`
	Keys     uint64 `json:"keys"`
	Revision uint64 `json:"revision"`
	Done     bool   `json:"done"`
}

func storeMigrate(o *options) *cobra.Command {
	var m move
	var yes bool
	cmd := &cobra.Command{
		Use:   "migrate --from FILE --to FILE [--yes]",
		Short: "Move a store from Badger to etcd, or back",
		Long: `Copy the store of one configuration of merlon-ca into the empty store of
another, compare every key, value and revision, and leave the first as it is.
Every CA is stopped meanwhile. Nothing is lost: agents do not notice. Without
--yes the command only looks whether it could, and says what it would do.`,
		Example: `  merlon store migrate --from /etc/merlon/ca.yaml --to /etc/merlon/ca-etcd.yaml
  merlon store migrate --from /etc/merlon/ca.yaml --to /etc/merlon/ca-etcd.yaml --yes`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			source, target, err := m.read("merlon store migrate --from /etc/merlon/ca.yaml --to /etc/merlon/ca-etcd.yaml")
			if err != nil {
				return err
			}
			done, err := offline.Migrate(cmd.Context(), source, target, !yes)
			if err != nil {
				return storeHint(err)
			}
			return o.printMigrated(cmd, done, source, target, m.to)
		},
	}
	m.register(cmd)
	cmd.Flags().BoolVar(&yes, "yes", false, "do it, not only look whether it could be done")
	return cmd
}

func (o *options) printMigrated(cmd *cobra.Command, m offline.Migrated, from, to ca.Config, file string) error {
	var err error
	if o.output == "json" {
		err = printJSON(cmd.OutOrStdout(), migratedJSON{m.From, m.To, m.Keys, m.Revision, m.Done})
	} else {
		done := "no, only looked at"
		if m.Done {
			done = "yes, and compared"
		}
		err = printFields(cmd.OutOrStdout(), "from", m.From, "to", m.To, "keys", strconv.FormatUint(m.Keys, 10),
			"revision", strconv.FormatUint(m.Revision, 10), "done", done)
	}
	if err != nil {
		return err
	}
	if !m.Done {
		_, err := fmt.Fprintln(cmd.ErrOrStderr(), "hint: add --yes to do it")
		return err
	}
	if from.DataDir != to.DataDir {
		fmt.Fprintf(cmd.ErrOrStderr(), "hint: copy keys, kek and epoch (if they are there), audit*.jsonl and audit.tree from %s to %s: they are not in the store\n", from.DataDir, to.DataDir)
	}
	_, err = fmt.Fprintf(cmd.ErrOrStderr(), "hint: start the CA with -config %s, and never again on the old store: move it away\n", file)
	return err
}
