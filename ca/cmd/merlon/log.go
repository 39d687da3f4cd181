// merlon log: what the CA wrote down, read by who does not take its word: the
// whole log from its folder, and single SVIDs with proofs.

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/offline"
	"merlon.dev/sdk/checkpoint"
)

func logCommand(o *options) *cobra.Command {
	return noun("log", "The audit log: verify it, prove that it holds an SVID, find SVIDs that it does not hold",
		logVerify(o), logProve(o), logAudit(o))
}

// logJSON is `merlon log verify -o json`.
type logJSON struct {
	Path        string `json:"path"`
	Whole       bool   `json:"whole"`
	Problem     string `json:"problem,omitempty"`
	First       uint64 `json:"first"`
	Last        uint64 `json:"last"`
	Size        int64  `json:"checkpoint_size"`
	Root        string `json:"checkpoint_root,omitempty"`
	Origin      string `json:"origin,omitempty"`
	VerifierKey string `json:"verifier_key,omitempty"`
	RootHash    string `json:"root_hash,omitempty"`
	// Acts that begin and have no outcome.
	Unfinished []unfinishedJSON `json:"unfinished"`
}

type unfinishedJSON struct {
	Seq    uint64    `json:"seq"`
	Time   time.Time `json:"time"`
	Actor  string    `json:"actor"`
	Detail string    `json:"detail"`
	Act    string    `json:"act"`
}

func logVerify(o *options) *cobra.Command {
	var of storeFlags
	var pinned string
	cmd := &cobra.Command{
		Use:   "verify {--config FILE | --data-dir FOLDER}",
		Short: "Read the audit log in a CA's folder whole, and say what is damaged",
		Long: `Read every record of the audit log in a CA's data_dir: that each follows the one
before, is the leaf that the signed tree has in its place, and that none is
missing but those that retention dropped. The CA may run. root_hash is that of
the root which vouches for the key that signed the checkpoint; with --root-hash
it is compared. Exit code 1 means that something was changed or is missing.
Records behind the checkpoint, those of the last seconds, are in the chain only.
What an administrator does is two records with one act: it begins, and its
outcome. unfinished are those that begin and have no outcome: the CA was killed
in them, or is at them now; look whether they were done.`,
		Example: `  merlon log verify --data-dir /var/lib/merlon/ca
  merlon log verify --config /etc/merlon/ca.yaml --root-hash 3f…`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !of.given() {
				return usageError{"whose log?", "name its folder: merlon log verify --data-dir /var/lib/merlon/ca"}
			}
			if cmd.Flags().Changed("root-hash") {
				sum, err := hex.DecodeString(pinned)
				if err != nil || len(sum) != sha256.Size {
					return usageError{fmt.Sprintf("--root-hash %q is no SHA-256 in hex", pinned), "merlon trust show has that of each root"}
				}
			}
			cfg, err := of.read()
			if err != nil {
				return err
			}
			r, err := offline.VerifyAuditLog(cfg)
			if err != nil {
				return hintError{err, "name the folder that merlon-ca has as its data_dir, as a user who may read it"}
			}
			return printLog(cmd, o.output, r, pinned)
		},
	}
	cmd.Flags().StringVar(&of.config, "config", "", "the configuration file of the CA")
	cmd.Flags().StringVar(&of.dataDir, "data-dir", "", "the data_dir of the CA")
	cmd.Flags().StringVar(&pinned, "root-hash", "", "the root that must vouch for the log: SHA-256 of its public key in hex")
	return cmd
}

func printLog(cmd *cobra.Command, output string, r offline.LogReport, pinned string) error {
	if r.Problem == "" && pinned != "" && !strings.EqualFold(pinned, r.RootHash) {
		r.Problem = fmt.Sprintf("another root vouches for it than the one with hash %s", pinned)
	}
	out := logJSON{r.Path, r.Problem == "", r.Problem, r.First, r.Last, r.Size, r.Root, r.Origin, r.VerifierKey, r.RootHash, []unfinishedJSON{}}
	for _, u := range r.Unfinished {
		out.Unfinished = append(out.Unfinished, unfinishedJSON(u))
	}
	var err error
	if output == "json" {
		err = printJSON(cmd.OutOrStdout(), out)
	} else {
		err = printFields(cmd.OutOrStdout(),
			"path", out.Path, "first", strconv.FormatUint(out.First, 10), "last", strconv.FormatUint(out.Last, 10),
			"checkpoint_size", strconv.FormatInt(out.Size, 10), "checkpoint_root", out.Root, "origin", out.Origin,
			"verifier_key", out.VerifierKey, "root_hash", out.RootHash, "unfinished", strconv.Itoa(len(out.Unfinished)))
		for _, u := range out.Unfinished {
			fmt.Fprintf(cmd.ErrOrStderr(), "unfinished: record %d, %s, %s: %q has no outcome: look whether it was done\n", u.Seq, u.Time.Format(time.RFC3339), u.Actor, u.Detail)
		}
	}
	switch {
	case err != nil:
		return err
	case r.Problem != "":
		return hintError{fmt.Errorf("%s is not whole: %s", r.Path, r.Problem), "keep the folder as it is; compare it with the last good copy"}
	case r.Size == 0:
		fmt.Fprintln(cmd.ErrOrStderr(), "hint: no checkpoint is saved yet: that records are missing at the end cannot be seen")
	case pinned == "":
		fmt.Fprintln(cmd.ErrOrStderr(), "hint: compare root_hash with that of merlon trust show, or give it as --root-hash")
	}
	return nil
}

// provenLog is a log whose checkpoint has been verified.
type provenLog struct {
	resp  *capb.ProveIssuancesResponse
	state checkpoint.Checkpoint
}

// proveIssuances asks the CA, and takes its word for nothing but its trust
// bundle: the checkpoint must be signed by a key that one of the roots there
// vouches for.
func proveIssuances(ctx context.Context, c capb.AdminClient, serials []string) (*provenLog, error) {
	trusted, err := c.GetTrustBundle(ctx, &capb.GetTrustBundleRequest{})
	if err != nil {
		return nil, err
	}
	td, err := spiffeid.TrustDomainFromString(trusted.GetTrustBundle().GetTrustDomain())
	if err != nil {
		return nil, err
	}
	bundle, err := spiffebundle.Parse(td, trusted.GetTrustBundle().GetJwks())
	if err != nil {
		return nil, fmt.Errorf("read the trust bundle: %w", err)
	}
	resp, err := c.ProveIssuances(ctx, &capb.ProveIssuancesRequest{Serials: serials})
	if err != nil {
		return nil, err
	}
	chain := resp.GetCertificates()
	if len(chain) < 2 {
		return nil, errors.New("the CA sent no certificate of the log's key")
	}
	key, err := checkpoint.VerifyChain(chain[:len(chain)-1], bundle.X509Authorities(), td.Name(), time.Now())
	if err != nil {
		return nil, err
	}
	state, err := key.Open(resp.GetCheckpoint())
	if err != nil {
		return nil, err
	}
	return &provenLog{resp, state}, nil
}

// record is what of a log's entry is looked at here.
type record struct {
	Time       time.Time `json:"time"`
	SPIFFEID   string    `json:"spiffe_id"`
	Serial     string    `json:"serial"`
	SignedHash string    `json:"signed_sha256"`
}

// verify checks the proof of one record, and that the record is of the serial
// number.
func (l *provenLog) verify(p *capb.IssuanceProof) (record, error) {
	hashes, err := checkpoint.HashesFromBytes(p.GetHashes())
	if err != nil {
		return record{}, err
	}
	if err := l.state.Holds(p.GetEntry(), p.GetIndex(), hashes); err != nil {
		return record{}, err
	}
	var r record
	if err := json.Unmarshal(p.GetEntry(), &r); err != nil || r.Serial != p.GetSerial() || r.SignedHash == "" {
		return record{}, fmt.Errorf("record %d of the log is not about the SVID with serial number %s", p.GetIndex(), p.GetSerial())
	}
	return r, nil
}

// proofJSON is `merlon log prove -o json`: all that is needed to verify it.
type proofJSON struct {
	Serial       string          `json:"serial"`
	SPIFFEID     string          `json:"spiffe_id"`
	Origin       string          `json:"origin"`
	Index        int64           `json:"index"`
	Size         int64           `json:"size"`
	Record       json.RawMessage `json:"record"`
	Entry        []byte          `json:"entry"`
	Proof        string          `json:"proof"`
	Certificates string          `json:"certificates"`
}

func logProve(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "prove SERIAL",
		Short: "Prove that the log holds the SVID with this serial number",
		Long: `Prove that the log of the CA holds the SVID with this serial number (hex, as
openssl prints it, and as audit records and a JWT-SVID's jti have it): the record, its place, and an
inclusion proof under a signed checkpoint. The proof is verified here, under the
roots of the trust bundle. With -o json it can be handed on: proof is a C2SP
tlog-proof of entry, and certificates vouch for the key of its checkpoint.`,
		Example: `  merlon log prove 1f3c…
  merlon log prove 1f3c… -o json > proof.json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			serial, err := serialNumber(args[0], "merlon log prove 1f3c…; merlon log audit FILE reads it from an SVID")
			if err != nil {
				return err
			}
			return o.withCA(cmd.Context(), func(c capb.AdminClient) error {
				log, err := proveIssuances(cmd.Context(), c, []string{serial})
				if err != nil {
					return err
				}
				if len(log.resp.GetProofs()) == 0 {
					return hintError{
						fmt.Errorf("the log of replica %s holds no SVID with serial number %s", log.resp.GetReplicaName(), serial),
						fmt.Sprintf("it has records since %s; each replica has its own log: ask others with --ca; for a certificate, merlon log audit says whose", formatTime(log.resp.GetBeginsAt())),
					}
				}
				return log.print(cmd, o.output, log.resp.GetProofs()[0])
			})
		},
	}
}

func (l *provenLog) print(cmd *cobra.Command, output string, p *capb.IssuanceProof) error {
	r, err := l.verify(p)
	if err != nil {
		return err
	}
	if output != "json" {
		return printFields(cmd.OutOrStdout(),
			"serial", r.Serial, "spiffe_id", r.SPIFFEID, "issued_at", r.Time.Format(time.RFC3339), "signed_sha256", r.SignedHash,
			"origin", l.state.Origin, "index", strconv.FormatInt(p.GetIndex(), 10), "size", strconv.FormatInt(l.state.Size, 10),
			"root", l.state.Root.String(), "verified", "true")
	}
	hashes, err := checkpoint.HashesFromBytes(p.GetHashes())
	if err != nil {
		return err
	}
	var certificates strings.Builder
	for _, der := range l.resp.GetCertificates() {
		certificates.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	return printJSON(cmd.OutOrStdout(), proofJSON{
		r.Serial, r.SPIFFEID, l.state.Origin, p.GetIndex(), l.state.Size, p.GetEntry(), p.GetEntry(),
		checkpoint.FormatProof(p.GetIndex(), hashes, l.resp.GetCheckpoint()), certificates.String(),
	})
}
