// merlon store: back up, verify, restore and move what the CA remembers.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/offline"
	"merlon.dev/ca/internal/opening"
)

func storeCommand(o *options) *cobra.Command {
	return noun("store", "The CA's store: back up, verify, restore, move between Badger and etcd",
		storeBackup(o), storeVerify(o), storeRestore(o), storeMigrate(o))
}

// storeHint adds what to do next, where the CA's package knows it.
func storeHint(err error) error {
	if e, ok := errors.AsType[*offline.MismatchError](err); ok {
		return usageError{e.Error(), e.Hint}
	}
	if e, ok := errors.AsType[*opening.StoreError](err); ok {
		return hintError{err, e.Hint}
	}
	return err
}

// backupJSON is a backup as scripts see it.
type backupJSON struct {
	File      string    `json:"file"`
	Revision  uint64    `json:"revision"`
	CreatedAt time.Time `json:"created_at"`
	Keys      uint64    `json:"keys"`
	Bytes     int64     `json:"bytes"`
	SHA256    string    `json:"sha256"`
}

func newBackupJSON(r offline.StoreReport) backupJSON {
	return backupJSON{r.Place, r.Revision, r.CreatedAt, r.Keys, r.Bytes, r.SHA256}
}

func (b backupJSON) fields() []string {
	return []string{
		"file", b.File, "revision", strconv.FormatUint(b.Revision, 10), "created_at", b.CreatedAt.Format(time.RFC3339),
		"keys", strconv.FormatUint(b.Keys, 10), "bytes", strconv.FormatInt(b.Bytes, 10), "sha256", b.SHA256,
	}
}

func storeBackup(o *options) *cobra.Command {
	var from storeFlags
	var force bool
	cmd := &cobra.Command{
		Use:   "backup FILE",
		Short: "Write everything in the store, at one revision, to a file",
		Long: `Write everything in the store, at one revision, to a file: from a running CA
over its admin socket or --ca, or with --config or --data-dir from one that is
stopped. The backup holds entries, agents, revocations, the trust bundle, the
policy bundles and hashes of tokens, and no key: keep a copy of data_dir/keys
beside it, or on a new machine the backup is the registrations of a CA whose
root nobody has.`,
		Example: `  merlon store backup /backup/merlon-$(date +%F).backup
  merlon store backup /backup/last.backup --force
  merlon store backup /backup/last.backup --config /etc/merlon/ca.yaml`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			report, err := writeFile(args[0], force, func(w *os.File) error {
				return o.backupTo(cmd.Context(), w, &from)
			})
			if err != nil {
				return storeHint(err)
			}
			out := newBackupJSON(report)
			if o.output == "json" {
				return printJSON(cmd.OutOrStdout(), out)
			}
			if err := printFields(cmd.OutOrStdout(), out.fields()...); err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.ErrOrStderr(), "hint: no key is in it: keep a copy of the CA's data_dir/keys too, and elsewhere one of what they are sealed under (key_file; by default data_dir/kek)")
			return err
		},
	}
	from.register(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "replace the file if it exists; only a regular file, that behind a link")
	return cmd
}

// backupTries is how often a backup begins again because the store moved on.
const backupTries = 5

func (o *options) backupTo(ctx context.Context, w *os.File, from *storeFlags) error {
	if from.given() {
		cfg, err := from.read()
		if err != nil {
			return err
		}
		_, err = offline.Backup(ctx, cfg, w)
		return err
	}
	return o.withCA(ctx, func(c capb.AdminClient) error {
		for try := 1; ; try++ {
			err := receiveBackup(ctx, c, w)
			if status.Code(err) != codes.Aborted || try == backupTries {
				return err
			}
			if _, err := w.Seek(0, io.SeekStart); err != nil {
				return err
			}
			if err := w.Truncate(0); err != nil {
				return err
			}
		}
	})
}

func receiveBackup(ctx context.Context, c capb.AdminClient, w io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.BackupStore(ctx, &capb.BackupStoreRequest{})
	if err != nil {
		return err
	}
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := w.Write(msg.GetData()); err != nil {
			return err
		}
	}
}

// verifiedJSON is `merlon store verify -o json`.
type verifiedJSON struct {
	Kind         string     `json:"kind"`
	Place        string     `json:"place"`
	Whole        bool       `json:"whole"`
	Problem      string     `json:"problem,omitempty"`
	Revision     uint64     `json:"revision"`
	MissingFirst uint64     `json:"missing_first,omitempty"`
	MissingLast  uint64     `json:"missing_last,omitempty"`
	Keys         uint64     `json:"keys"`
	CreatedAt    *time.Time `json:"created_at,omitempty"`
	Bytes        int64      `json:"bytes,omitempty"`
	SHA256       string     `json:"sha256,omitempty"`
}

func storeVerify(o *options) *cobra.Command {
	var of storeFlags
	cmd := &cobra.Command{
		Use:   "verify [FILE | FOLDER | --config FILE | --data-dir FOLDER]",
		Short: "Read a backup or a store whole, and say what is damaged",
		Long: `Read every record of a backup file, or of the store of a CA, and check it
against its checksums: of a Badger store, which no CA may have open, also the
chain of its revisions and its head; of etcd every record. Exit code 0 means
that all is there, 1 that something is missing or was altered; then the last
good revision and the missing ones are named. Nothing is changed.`,
		Example: `  merlon store verify /backup/last.backup
  merlon store verify --config /etc/merlon/ca.yaml
  merlon store verify /var/lib/merlon/ca/store`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			report, err := of.verify(cmd.Context(), args)
			if err != nil {
				return storeHint(err)
			}
			if err := printVerified(cmd.OutOrStdout(), o.output, report); err != nil {
				return err
			}
			if report.Problem != "" {
				return hintError{fmt.Errorf("%s is damaged: %s", report.Place, report.Problem), damagedHint(report)}
			}
			return nil
		},
	}
	of.register(cmd)
	return cmd
}

func (f *storeFlags) verify(ctx context.Context, args []string) (offline.StoreReport, error) {
	if (len(args) == 1) == f.given() {
		return offline.StoreReport{}, usageError{"say what to verify: a backup, a folder, or a CA's store", "for example merlon store verify --config /etc/merlon/ca.yaml"}
	}
	if len(args) == 0 {
		cfg, err := f.read()
		if err != nil {
			return offline.StoreReport{}, err
		}
		return offline.VerifyStore(ctx, cfg)
	}
	fi, err := os.Stat(args[0])
	if err != nil {
		return offline.StoreReport{}, notThere(err, "name a backup, or the folder of a Badger store; merlon store verify --config FILE finds a CA's")
	}
	if fi.IsDir() {
		return offline.VerifyStoreDir(args[0])
	}
	return offline.VerifyBackup(args[0])
}

func damagedHint(r offline.StoreReport) string {
	switch {
	case r.Kind == "backup":
		return "use another backup"
	case r.Kind == "badger" && r.Revision != 0:
		return fmt.Sprintf("restore a backup: merlon store restore -h; or go on without what is missing: merlon-ca -accept-older-store=%d", r.Revision)
	default:
		return "restore a backup: merlon store restore -h"
	}
}

func printVerified(w io.Writer, output string, r offline.StoreReport) error {
	out := verifiedJSON{
		Kind: r.Kind, Place: r.Place, Whole: r.Problem == "", Problem: r.Problem, Revision: r.Revision,
		MissingFirst: r.MissingFirst, MissingLast: r.MissingLast, Keys: r.Keys, Bytes: r.Bytes, SHA256: r.SHA256,
	}
	if !r.CreatedAt.IsZero() {
		out.CreatedAt = &r.CreatedAt
	}
	if output == "json" {
		return printJSON(w, out)
	}
	whole, revision := "yes", "revision"
	if !out.Whole {
		whole, revision = "no", "last_good_revision"
	}
	fields := []string{"kind", r.Kind, "place", r.Place, "whole", whole, revision, nonzero(r.Revision), "missing", missing(r), "keys", nonzero(r.Keys)}
	if out.CreatedAt != nil {
		fields = append(fields, "created_at", r.CreatedAt.Format(time.RFC3339))
	}
	return printFields(w, append(fields, "bytes", nonzero(uint64(max(r.Bytes, 0))), "sha256", r.SHA256)...)
}

// missing names the revisions that a store should have.
func missing(r offline.StoreReport) string {
	switch {
	case r.MissingFirst == 0 && r.MissingLast == 0:
		return ""
	case r.MissingFirst == 0:
		return fmt.Sprintf("any of 1 to %d", r.MissingLast)
	case r.MissingLast == 0:
		return fmt.Sprintf("from %d on", r.MissingFirst)
	default:
		return fmt.Sprintf("%d to %d", r.MissingFirst, r.MissingLast)
	}
}

// nonzero is empty for 0, which printFields leaves out.
func nonzero(n uint64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatUint(n, 10)
}

// joined is what to print of a list: its length and a few of it.
func joined(list []string, most int) string {
	if len(list) == 0 {
		return ""
	}
	shown := strings.Join(list[:min(len(list), most)], " ")
	if len(list) > most {
		shown += " …"
	}
	return fmt.Sprintf("%d: %s", len(list), shown)
}
