// merlon log audit: whether SVIDs that somebody shows were written down. One
// that was not is misuse of the CA's key.

package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/sdk/checkpoint"
)

const (
	// maxSVIDFile is the largest file that is read, maxAudited how many SVIDs
	// one call may ask about.
	maxSVIDFile = 1 << 20
	maxAudited  = 1000
)

// shown is an SVID from a file, and what the log says of it.
type shown struct {
	File     string `json:"file"`
	Serial   string `json:"serial"`
	SPIFFEID string `json:"spiffe_id"`
	// Result is "logged", "missing", "elsewhere" (another replica issued it),
	// "too old" (issued before the log begins) or "unreadable".
	Result  string `json:"result"`
	Replica string `json:"replica,omitempty"`
	// Problem says why a file is unreadable.
	Problem string `json:"problem,omitempty"`

	signedHash, issuer string
	issuedAt, notAfter time.Time
}

const unreadable = "unreadable"

func logAudit(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "audit FILE...",
		Short: "Find the SVIDs in files that the log does not hold",
		Long: `Look for each SVID in the files (X509-SVIDs in PEM, or a JWT-SVID) in the log of
the CA, and verify the proof that it is there. Exit code 1 means that one is not:
result "missing" says that the CA's key signed what its log does not hold, or
that somebody else did. Each replica has its own log: "elsewhere" names the one
to ask with --ca. "too old": by its times issued before the first record that is
kept, and with an end that such an SVID can have.
"unreadable": the file, or a part of it, holds no SVID; the others are looked for.`,
		Example: `  merlon log audit svid.pem
  merlon log audit --ca ca-2.example.org:8443 captured/*.pem -o json`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, files []string) error {
			svids, err := readShown(files)
			if err != nil {
				return err
			}
			if !slices.ContainsFunc(svids, func(s *shown) bool { return s.Result == "" }) {
				return printAudited(cmd, o.output, svids) // no question is left for a CA
			}
			return o.withCA(cmd.Context(), func(c capb.AdminClient) error {
				if err := judge(cmd.Context(), c, svids); err != nil {
					return err
				}
				return printAudited(cmd, o.output, svids)
			})
		},
	}
}

// readShown reads all files: one that cannot be read must not hide the others.
func readShown(files []string) (svids []*shown, err error) {
	for _, name := range files {
		var found []*shown
		content, err := readBounded(name)
		if err == nil {
			found, err = shownIn(content)
		}
		if err != nil {
			found = append(found, &shown{Result: unreadable, Problem: err.Error()})
		}
		for _, s := range found {
			s.File = name
		}
		svids = append(svids, found...)
	}
	if len(svids) > maxAudited {
		return nil, usageError{fmt.Sprintf("%d SVIDs are more than %d", len(svids), maxAudited), "give fewer files at a time"}
	}
	return svids, nil
}

func readBounded(name string) ([]byte, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, maxSVIDFile+1))
	if err == nil && len(content) > maxSVIDFile {
		err = fmt.Errorf("it has more than %d bytes: it is no file with SVIDs", maxSVIDFile)
	}
	return content, err
}

// shownIn reads the SVIDs of one file, also those before something that is none;
// authorities above them are passed over.
func shownIn(content []byte) (svids []*shown, err error) {
	if !bytes.Contains(content, []byte("-----BEGIN")) {
		s, err := shownToken(strings.TrimSpace(string(content)))
		if err != nil {
			return nil, err
		}
		return []*shown{s}, nil
	}
	for block, rest := pem.Decode(content); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return svids, err
		}
		if cert.IsCA {
			continue
		}
		s := &shown{Serial: cert.SerialNumber.Text(16), issuer: fmt.Sprintf("%x", cert.AuthorityKeyId), issuedAt: cert.NotBefore, notAfter: cert.NotAfter}
		if len(cert.URIs) > 0 {
			s.SPIFFEID = cert.URIs[0].String()
		}
		if s.signedHash, err = checkpoint.CertificateHash(cert.Raw); err != nil {
			return svids, err
		}
		svids = append(svids, s)
	}
	if len(svids) == 0 {
		return nil, errors.New("no SVID is in it")
	}
	return svids, nil
}

func shownToken(token string) (*shown, error) {
	hash, err := checkpoint.TokenHash(token)
	if err != nil {
		return nil, err
	}
	var claims struct {
		ID       string `json:"jti"`
		Subject  string `json:"sub"`
		IssuedAt int64  `json:"iat"`
		Expiry   int64  `json:"exp"`
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil {
		return nil, fmt.Errorf("read a JWT-SVID: %w", err)
	}
	return &shown{
		Serial: claims.ID, SPIFFEID: claims.Subject, signedHash: hash,
		issuedAt: time.Unix(claims.IssuedAt, 0), notAfter: time.Unix(claims.Expiry, 0),
	}, nil
}

// judge says of each SVID what the log says.
func judge(ctx context.Context, c capb.AdminClient, svids []*shown) error {
	var serials []string
	for _, s := range svids {
		if s.Result == "" && s.Serial != "" {
			serials = append(serials, s.Serial)
		}
	}
	if len(serials) == 0 {
		serials = []string{"0"} // no SVID has it; what the CA says of its log is needed all the same
	}
	log, err := proveIssuances(ctx, c, serials)
	if err != nil {
		return err
	}
	signed := make(map[string]bool) // what of these serial numbers the log holds
	for _, p := range log.resp.GetProofs() {
		r, err := log.verify(p)
		if err != nil {
			return err
		}
		signed[r.Serial+" "+r.SignedHash] = true
	}
	issuers := make(map[string]string)
	for _, i := range log.resp.GetIssuers() {
		issuers[i.GetAuthorityId()] = i.GetReplicaName()
	}
	self := log.resp.GetReplicaName()
	for _, s := range svids {
		if s.Result != "" {
			continue
		}
		s.Replica = issuers[s.issuer]
		switch {
		case signed[s.Serial+" "+s.signedHash]:
			s.Result, s.Replica = "logged", self
		case s.Replica != "" && s.Replica != self:
			s.Result = "elsewhere"
		case log.resp.GetFirstIndex() > 0 && s.before(log.resp.GetBeginsAt().AsTime()):
			s.Result = "too old"
		default:
			s.Result = "missing"
		}
	}
	return nil
}

// before says whether s can have been issued before begin. Its own word alone
// is not taken for that: a forger writes the time that he likes. What was issued
// before has ended within the longest life of an SVID after.
func (s *shown) before(begin time.Time) bool {
	return s.issuedAt.Before(begin) && s.notAfter.Before(begin.Add(entry.MaxSVIDTTL))
}

func printAudited(cmd *cobra.Command, output string, svids []*shown) error {
	if output == "json" {
		if err := printJSON(cmd.OutOrStdout(), svids); err != nil {
			return err
		}
	} else {
		var rows [][]string
		for _, s := range svids {
			rows = append(rows, []string{s.Result, s.File, s.Serial, s.SPIFFEID, s.Replica})
		}
		if err := printTable(cmd.OutOrStdout(), []string{"RESULT", "FILE", "SERIAL", "SPIFFE_ID", "REPLICA"}, rows); err != nil {
			return err
		}
	}
	missing, unjudged, unread := 0, 0, 0
	for _, s := range svids {
		switch s.Result {
		case unreadable:
			unread++
			if output != "json" {
				fmt.Fprintf(cmd.ErrOrStderr(), "%s: %s\n", s.File, s.Problem)
			}
		case "missing":
			missing++
		case "elsewhere", "too old":
			unjudged++
		}
	}
	switch {
	case missing > 0:
		return hintError{
			fmt.Errorf("%d of %d SVIDs are not in the log: the key of an authority signed them without the CA, or they are forged", missing, len(svids)-unread),
			"revoke each: merlon revoke --serial SERIAL; and find out who has the key",
		}
	case unread > 0:
		return hintError{fmt.Errorf("%d of %d files hold something that is no SVID, or cannot be read", unread, countFiles(svids)), "name files with X509-SVIDs in PEM, or one JWT-SVID each"}
	case unjudged > 0:
		return hintError{fmt.Errorf("%d of %d SVIDs cannot be judged by this log", unjudged, len(svids)), "ask the replica that issued them: --ca"}
	}
	return nil
}

// countFiles is from how many files they are.
func countFiles(svids []*shown) int {
	names := make(map[string]bool)
	for _, s := range svids {
		names[s.File] = true
	}
	return len(names)
}
