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
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"merlon.dev/ca/capb"
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
	// Result is "logged", "missing", "elsewhere" (another replica issued it) or
	// "too old" (issued before the log begins).
	Result  string `json:"result"`
	Replica string `json:"replica,omitempty"`

	signedHash, issuer string
	issuedAt           time.Time
}

func logAudit(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "audit FILE...",
		Short: "Find the SVIDs in files that the log does not hold",
		Long: `Look for each SVID in the files (X509-SVIDs in PEM, or a JWT-SVID) in the log of
the CA, and verify the proof that it is there. Exit code 1 means that one is not:
result "missing" says that the CA's key signed what its log does not hold, or
that somebody else did. Each replica has its own log: "elsewhere" names the one
to ask with --ca. "too old": issued before the first record that is kept.`,
		Example: `  merlon log audit svid.pem
  merlon log audit --ca ca-2.example.org:8443 captured/*.pem -o json`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, files []string) error {
			svids, err := readShown(files)
			if err != nil {
				return err
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

func readShown(files []string) (svids []*shown, err error) {
	for _, name := range files {
		info, err := os.Stat(name)
		if err != nil {
			return nil, err
		}
		if info.Size() > maxSVIDFile {
			return nil, fmt.Errorf("%s has more than %d bytes: it is no file with SVIDs", name, maxSVIDFile)
		}
		content, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		found, err := shownIn(content)
		if err != nil {
			return nil, hintError{fmt.Errorf("read %s: %w", name, err), "name files with X509-SVIDs in PEM, or one JWT-SVID each"}
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

// shownIn reads the SVIDs of one file; authorities above them are passed over.
func shownIn(content []byte) (svids []*shown, err error) {
	if !bytes.Contains(content, []byte("-----BEGIN")) {
		s, err := shownToken(strings.TrimSpace(string(content)))
		return []*shown{s}, err
	}
	for block, rest := pem.Decode(content); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		if cert.IsCA {
			continue
		}
		s := &shown{Serial: cert.SerialNumber.Text(16), issuer: fmt.Sprintf("%x", cert.AuthorityKeyId), issuedAt: cert.NotBefore}
		if len(cert.URIs) > 0 {
			s.SPIFFEID = cert.URIs[0].String()
		}
		if s.signedHash, err = checkpoint.CertificateHash(cert.Raw); err != nil {
			return nil, err
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
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil {
		return nil, fmt.Errorf("read a JWT-SVID: %w", err)
	}
	return &shown{Serial: claims.ID, SPIFFEID: claims.Subject, signedHash: hash, issuedAt: time.Unix(claims.IssuedAt, 0)}, nil
}

// judge says of each SVID what the log says.
func judge(ctx context.Context, c capb.AdminClient, svids []*shown) error {
	var serials []string
	for _, s := range svids {
		serials = append(serials, s.Serial)
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
		s.Replica = issuers[s.issuer]
		switch {
		case signed[s.Serial+" "+s.signedHash]:
			s.Result, s.Replica = "logged", self
		case s.Replica != "" && s.Replica != self:
			s.Result = "elsewhere"
		case log.resp.GetFirstIndex() > 0 && s.issuedAt.Before(log.resp.GetBeginsAt().AsTime()):
			s.Result = "too old"
		default:
			s.Result = "missing"
		}
	}
	return nil
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
	missing, unjudged := 0, 0
	for _, s := range svids {
		switch s.Result {
		case "missing":
			missing++
		case "elsewhere", "too old":
			unjudged++
		}
	}
	switch {
	case missing > 0:
		return hintError{
			fmt.Errorf("%d of %d SVIDs are not in the log: the key of an authority signed them without the CA, or they are forged", missing, len(svids)),
			"revoke each: merlon revoke --serial SERIAL; and find out who has the key",
		}
	case unjudged > 0:
		return hintError{fmt.Errorf("%d of %d SVIDs cannot be judged by this log", unjudged, len(svids)), "ask the replica that issued them: --ca"}
	}
	return nil
}
