// SVIDs for workloads, as entries say, and nothing else.

package fakeca

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"net/url"
	"time"

	"google.golang.org/grpc/codes"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// Sign implements capb.NodeServer.
func (ca *CA) Sign(ctx context.Context, req *capb.SignRequest) (*capb.SignResponse, error) {
	if err := requireAgent(ctx); err != nil {
		return nil, err
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.signs++
	if ca.signErr != nil {
		return nil, ca.signErr
	}
	m := &capb.SignResponse{}
	for _, item := range req.GetItems() {
		e := ca.entries[item.GetEntryId()]
		if e == nil {
			m.Results = append(m.Results, &capb.SignResult{Code: int32(codes.NotFound), Message: "no such entry"})
			continue
		}
		chain, err := ca.sign(item.GetCsr(), e.GetSpiffeId(), ca.svidTTL)
		if err != nil {
			return nil, err
		}
		ca.signed++
		m.Results = append(m.Results, &capb.SignResult{X509Svid: chain})
	}
	return m, nil
}

// SignJWT implements capb.NodeServer.
func (ca *CA) SignJWT(ctx context.Context, req *capb.SignJWTRequest) (*capb.SignJWTResponse, error) {
	if err := requireAgent(ctx); err != nil {
		return nil, err
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if ca.signErr != nil {
		return nil, ca.signErr
	}
	m := &capb.SignJWTResponse{}
	for _, item := range req.GetItems() {
		e := ca.entries[item.GetEntryId()]
		if e == nil {
			m.Results = append(m.Results, &capb.SignJWTResult{Code: int32(codes.NotFound), Message: "no such entry"})
			continue
		}
		serial, err := svid.NewSerial(7, ca.revision)
		if err != nil {
			return nil, err
		}
		m.Results = append(m.Results, &capb.SignJWTResult{Token: ca.Root.JWT(ca.Root.Header(nil), ca.Root.Claims("", forge.Fields{
			"sub": e.GetSpiffeId(), "aud": item.GetAudience(), "jti": serial.String(),
		}))})
	}
	return m, nil
}

// sign issues for a CSR. ca.mu is held.
func (ca *CA) sign(csr []byte, id string, ttl time.Duration) ([][]byte, error) {
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, err
	}
	if err := req.CheckSignature(); err != nil {
		return nil, err
	}
	serial, err := svid.NewSerial(7, ca.revision)
	if err != nil {
		return nil, err
	}
	uri, err := url.Parse(id)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := ca.inter.Leaf("/x").Chain[0]
	template.SerialNumber, template.URIs = serial.Big(), []*url.URL{uri}
	template.NotBefore, template.NotAfter = now.Add(-time.Minute), now.Add(ttl)
	template.ExtraExtensions = nil
	ski := sha256.Sum256(csr)
	template.SubjectKeyId = ski[:20]
	der, err := x509.CreateCertificate(rand.Reader, template, ca.inter.Cert, req.PublicKey, ca.inter.Key)
	if err != nil {
		return nil, err
	}
	return [][]byte{der, ca.inter.Cert.Raw}, nil
}
