// A text form of certificates for golden files: a change of a profile shows up as
// a line of a diff. What is random or a moment in time is masked.

package forge

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
)

var extensionNames = map[string]string{
	"2.5.29.14": "subject key ID", "2.5.29.15": "keyUsage", "2.5.29.17": "SAN", "2.5.29.19": "basicConstraints",
	"2.5.29.30": "name constraints", "2.5.29.35": "authority key ID", "2.5.29.37": "extended key usage",
}

var usageNames = []string{
	"digitalSignature", "contentCommitment", "keyEncipherment", "dataEncipherment", "keyAgreement",
	"keyCertSign", "cRLSign", "encipherOnly", "decipherOnly",
}

var ekuNames = map[x509.ExtKeyUsage]string{
	x509.ExtKeyUsageServerAuth: "serverAuth", x509.ExtKeyUsageClientAuth: "clientAuth", x509.ExtKeyUsageCodeSigning: "codeSigning",
}

// Dump writes everything that a profile decides, in the order of the certificate.
func Dump(c *x509.Certificate) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("version: %d", c.Version)
	line("serial: positive=%t, at most 20 octets=%t", c.SerialNumber.Sign() > 0, c.SerialNumber.BitLen() < 160)
	line("signature: %s", c.SignatureAlgorithm)
	line("issuer: %s", dumpName(c.Issuer))
	line("lifetime: %s", c.NotAfter.Sub(c.NotBefore))
	line("subject: %s", dumpName(c.Subject))
	line("public key: %s", dumpKey(c))
	for _, ext := range c.Extensions {
		critical := ""
		if ext.Critical {
			critical = " (critical)"
		}
		line("%s%s: %s", extensionName(ext), critical, dumpExtension(c, ext))
	}
	return b.String()
}

func extensionName(ext pkix.Extension) string {
	if name, ok := extensionNames[ext.Id.String()]; ok {
		return name
	}
	return ext.Id.String()
}

var generationID = regexp.MustCompile(`SERIALNUMBER=[0-9a-f]+`)

func dumpName(name pkix.Name) string {
	if len(name.Names) == 0 {
		return "empty"
	}
	return generationID.ReplaceAllString(name.String(), "SERIALNUMBER=*")
}

func dumpKey(c *x509.Certificate) string {
	switch key := c.PublicKey.(type) {
	case *ecdsa.PublicKey:
		return "ECDSA " + key.Curve.Params().Name
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", key.N.BitLen())
	}
	return fmt.Sprintf("%T", c.PublicKey)
}

func dumpExtension(c *x509.Certificate, ext pkix.Extension) string {
	switch extensionName(ext) {
	case "subject key ID":
		return fmt.Sprintf("%d octets", len(c.SubjectKeyId))
	case "authority key ID":
		return fmt.Sprintf("%d octets, own key=%t", len(c.AuthorityKeyId), bytes.Equal(c.AuthorityKeyId, c.SubjectKeyId))
	case "keyUsage":
		var names []string
		for i, name := range usageNames {
			if c.KeyUsage&(1<<i) != 0 {
				names = append(names, name)
			}
		}
		return strings.Join(names, ", ")
	case "extended key usage":
		var names []string
		for _, usage := range c.ExtKeyUsage {
			names = append(names, ekuNames[usage])
		}
		return strings.Join(names, ", ")
	case "basicConstraints":
		return fmt.Sprintf("CA=%t, path length=%d", c.IsCA, c.MaxPathLen)
	case "SAN":
		return fmt.Sprintf("URI=%v DNS=%v email=%v IP=%v", c.URIs, c.DNSNames, c.EmailAddresses, c.IPAddresses)
	case "name constraints":
		return fmt.Sprintf("URI permitted=%v excluded=%v", c.PermittedURIDomains, c.ExcludedURIDomains)
	}
	return hex.EncodeToString(ext.Value)
}
